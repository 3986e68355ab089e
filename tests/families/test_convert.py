"""HF checkpoints to megatron shards and back, on tiny random models made by transformers.

Not covered here: that megatron's forward pass with these weights equals transformers' (the parallel room's tests).
"""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from owpo_megatron.config import Config, ParallelConfig
from owpo_megatron.conversion import HFWriter
from owpo_megatron.errors import UserError
from owpo_megatron.families import (
    MLP,
    Attention,
    Experts,
    HFReader,
    Norms,
    Place,
    Rope,
    Router,
    check_context,
    check_parallel,
    check_weights,
    hf_shapes,
    layers_of_stages,
    padded_vocab_size,
    place_of,
    read_hf_config,
    to_hf,
    to_megatron,
)

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
MODELS = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "qwen2_tied": (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "qwen3_tied": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {"num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": True, "vocab_size": 5},
    ),
    "llama": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4, "rope_parameters": LLAMA3}),
    "llama_one_group": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 1}),
    "mistral": (MistralForCausalLM, MistralConfig, {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {
            "num_key_value_heads": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("hf")
    for name, (model_class, config_class, changes) in MODELS.items():
        model = model_class(config_class(**(SIZES | changes)))
        for parameter in model.parameters():
            parameter.data.normal_()  # norms and biases too: they start as ones and zeros
        model.to(torch.bfloat16 if name == "mistral" else torch.float32).save_pretrained(root / name)
    return root


def megatron_names(model, engine):
    """Written out again, as megatron-core's modules name them."""
    norms = {"local": ["input_layernorm.weight"], "te": ["self_attention.linear_qkv.layer_norm_weight"]}[engine]
    if model.experts:
        expert = {"local": "mlp.experts.local_experts.{}.{}.weight", "te": "mlp.experts.{1}.weight{0}"}[engine]
        mlp = [expert.format(e, part) for e in range(model.num_experts) for part in ("linear_fc1", "linear_fc2")]
        mlp += ["mlp.router.weight", "pre_mlp_layernorm.weight"]
    else:
        mlp = ["mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
        norms += {"local": ["pre_mlp_layernorm.weight"], "te": ["mlp.linear_fc1.layer_norm_weight"]}[engine]
    inside = [*norms, "self_attention.linear_qkv.weight", "self_attention.linear_proj.weight", *mlp]
    inside += ["self_attention.linear_qkv.bias"] if model.attention.qkv_bias else []
    inside += [f"self_attention.{x}_layernorm.weight" for x in "qk"] if model.attention.qk_norm else []
    names = ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight"]
    names += [f"decoder.layers.{layer}.{name}" for layer in range(model.num_layers) for name in inside]
    return names + ([] if model.tied else ["output_layer.weight"])


@pytest.mark.parametrize("engine", ["local", "te"])
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("name", list(MODELS))
def test_round_trip_is_bitwise(folders, name, tp_size, engine):
    model = read_hf_config(folders / name)
    reader = HFReader(folders / name)
    if model.attention.num_kv_heads % tp_size:
        with pytest.raises(AssertionError, match="groups do not divide over TP ranks"):
            to_megatron(model, "decoder.layers.0.self_attention.linear_qkv.weight", reader, tp_rank=0, tp_size=tp_size)
        return
    check_weights(model, reader)
    original = load_file(folders / name / "model.safetensors")
    back = {}
    for megatron_name in megatron_names(model, engine):
        shards = [to_megatron(model, megatron_name, reader, tp_rank=r, tp_size=tp_size) for r in range(tp_size)]
        assert len({shard.shape for shard in shards}) == 1
        for hf_name, tensor in to_hf(model, megatron_name, shards):
            assert hf_name not in back
            back[hf_name] = tensor
    assert set(back) == set(original) == set(hf_shapes(model))
    for hf_name, tensor in original.items():
        assert back[hf_name].dtype == tensor.dtype and torch.equal(back[hf_name], tensor), hf_name


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_qkv_goes_group_by_group(folders, kind):
    """Worked by hand: 4 heads of 8 in 2 groups -> q0 q1 k0 v0 | q2 q3 k1 v1; the second half is rank 1's at tp 2."""
    model, reader = read_hf_config(folders / "qwen2"), HFReader(folders / "qwen2")
    q, k, v = (reader.slice(f"model.layers.1.self_attn.{x}_proj.{kind}", 0, 0, 99) for x in "qkv")
    name = f"decoder.layers.1.self_attention.linear_qkv.{kind}"
    first, second = torch.cat([q[:16], k[:8], v[:8]]), torch.cat([q[16:], k[8:], v[8:]])
    assert torch.equal(to_megatron(model, name, reader), torch.cat([first, second]))
    assert torch.equal(to_megatron(model, name, reader, tp_rank=0, tp_size=2), first)
    assert torch.equal(to_megatron(model, name, reader, tp_rank=1, tp_size=2), second)


def test_other_shards_by_hand(folders):
    model, reader = read_hf_config(folders / "qwen3"), HFReader(folders / "qwen3")
    original = load_file(folders / "qwen3" / "model.safetensors")

    def shard(name):
        return to_megatron(model, name, reader, tp_rank=1, tp_size=2)

    gate, up = (original[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    assert torch.equal(shard("decoder.layers.0.mlp.linear_fc1.weight"), torch.cat([gate[24:], up[24:]]))
    down = original["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(shard("decoder.layers.0.mlp.linear_fc2.weight"), down[:, 24:])
    out = original["model.layers.1.self_attn.o_proj.weight"]  # [32, 4 heads * 16]
    assert torch.equal(shard("decoder.layers.1.self_attention.linear_proj.weight"), out[:, 32:])
    norm = original["model.layers.1.self_attn.k_norm.weight"]
    assert torch.equal(shard("decoder.layers.1.self_attention.k_layernorm.weight"), norm)
    # 101 rows padded to 112: rank 1 holds rows 56..100 and eleven rows of zeros
    head = shard("output_layer.weight")
    assert torch.equal(head[:45], original["lm_head.weight"][56:]) and head.shape == (56, 32)
    assert not head[45:].any()


def test_tied_output_layer_reads_the_embedding_and_is_not_exported(folders):
    """5 rows padded to 16 at tp 2: rank 1 holds nothing but padding."""
    model, reader = read_hf_config(folders / "qwen3_tied"), HFReader(folders / "qwen3_tied")
    assert model.tied and "lm_head.weight" not in reader.names()
    for rank in range(2):
        embedding, head = (
            to_megatron(model, name, reader, tp_rank=rank, tp_size=2)
            for name in ("embedding.word_embeddings.weight", "output_layer.weight")
        )
        assert torch.equal(embedding, head) and embedding.shape == (8, 32)
        assert bool(embedding.any()) == (rank == 0)
    assert to_hf(model, "output_layer.weight", [head]) == []


def test_unknown_parameters_are_refused(folders):
    model, reader = read_hf_config(folders / "llama"), HFReader(folders / "llama")
    for name in (
        "decoder.layers.2.mlp.linear_fc1.weight",  # it has two layers
        "decoder.layers.0.self_attention.q_layernorm.weight",  # of another family
        "decoder.layers.0.mlp.linear_fc1.bias",
    ):
        with pytest.raises(UserError, match=f"megatron parameter = {name}: llama with 2 layers has none of that name"):
            to_megatron(model, name, reader)
        with pytest.raises(UserError, match="none of that name"):
            to_hf(model, name, [torch.zeros(1)])


# --------------------------------------------------------------------------------------------- config.json
def test_read_hf_config(folders):
    qwen3 = read_hf_config(folders / "qwen3")
    assert (qwen3.family_name, qwen3.tied) == ("qwen3", False)
    assert qwen3.attention == Attention(num_heads=4, num_kv_heads=2, head_dim=16, qk_norm="head")
    assert (qwen3.num_layers, qwen3.hidden_size, qwen3.mlp, qwen3.vocab_size) == (2, 32, MLP(48), 101)
    assert (qwen3.rope, qwen3.norms, qwen3.max_positions) == (Rope(1e6), Norms(1e-6), 128)
    qwen2 = read_hf_config(folders / "qwen2_tied")
    assert (qwen2.family_name, qwen2.tied) == ("qwen2", True)
    assert (qwen2.attention.qk_norm, qwen2.attention.qkv_bias) == (None, True)
    llama = read_hf_config(folders / "llama")
    assert (llama.rope, llama.attention.head_dim) == (Rope(5e5, llama3_factor=8.0), 8)
    assert read_hf_config(folders / "mistral").family_name == "mistral"


@pytest.fixture
def edited(folders, tmp_path):
    """edited(name, field=value): a copy of that model's config.json with fields changed (None removes one)."""

    def edit(name, **changes):
        config = json.loads((folders / name / "config.json").read_text()) | changes
        folder = tmp_path / "edited"
        folder.mkdir(exist_ok=True)
        kept = {field: value for field, value in config.items() if field not in changes or value is not None}
        (folder / "config.json").write_text(json.dumps(kept))
        return folder

    return edit


def test_configs_of_older_transformers(edited):
    """Before version 5 the rope settings were in rope_theta and rope_scaling."""
    qwen = edited("qwen3", rope_parameters=None, rope_theta=1234.0, rope_scaling=None)
    assert read_hf_config(qwen).rope == Rope(1234.0)
    scaling = {field: value for field, value in LLAMA3.items() if field != "rope_theta"}
    llama = edited("llama", rope_parameters=None, rope_theta=5e5, rope_scaling=scaling, head_dim=None)
    model = read_hf_config(llama)
    assert (model.rope, model.attention.head_dim) == (Rope(5e5, llama3_factor=8.0), 8)
    # Qwen2.5 names a window that it does not use
    assert read_hf_config(edited("qwen2", sliding_window=64, use_sliding_window=False)).family_name == "qwen2"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "qwen2",
            {"model_type": "gpt2"},
            "model_type gpt2 is not supported; supported: llama, mistral, qwen2, qwen3, .*docs/families.md",
        ),
        ("llama", {"attention_bias": True}, "attention_bias = True: not supported; only False is"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True: not supported"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = gelu: not supported; only silu is"),
        (
            "llama",
            {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}},
            "original_max_position_embeddings = 64: megatron-core has 8192 built in",
        ),
        (
            "llama",
            {"rope_parameters": YARN | {"attention_factor": 1.5}},
            "attention_factor = 1.5: megatron-core derives .* from factor; leave it out",
        ),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"= \(\[0\], 1\): not supported; only experts in every layer"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, r"= \(\[\], 2\): not supported; only experts in every layer"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type = dynamic: not supported; use default, linear, llama3 or yarn",
        ),
    ],
)
def test_what_megatron_would_get_wrong_is_refused(edited, name, changes, message):
    with pytest.raises(UserError, match=message):
        read_hf_config(edited(name, **changes))


def test_broken_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="model.path = .*nowhere: no such folder"):
        read_hf_config(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no config.json"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{\n oops")
    with pytest.raises(UserError, match="config.json = line 2: not valid JSON"):
        read_hf_config(tmp_path)
    with pytest.raises(UserError, match="holds no .safetensors weights"):
        HFReader(tmp_path)


def test_check_parallel(folders):
    model = read_hf_config(folders / "qwen2")  # 4 heads, 2 kv heads, ffn 48, 2 layers
    check_parallel(model, ParallelConfig(tp=2, pp=2))
    with pytest.raises(UserError, match="parallel.tp = 4: .* 4 attention heads, 2 key-value heads .* one of 1, 2$"):
        check_parallel(model, ParallelConfig(tp=4))
    with pytest.raises(UserError, match="parallel.pp = 3: some stages would have none of .* 2 layers; .* 1, 2$"):
        check_parallel(model, ParallelConfig(pp=3))
    with pytest.raises(UserError, match="parallel.vpp = 2: must divide the 1 layers of a pipeline rank"):
        check_parallel(model, ParallelConfig(pp=2, vpp=2))
    check_parallel(dataclasses.replace(model, num_layers=7), ParallelConfig(pp=4))
    with pytest.raises(UserError, match="parallel.vpp = 2: interleaved stages need equal ones; .* a pp of 1, 7$"):
        check_parallel(dataclasses.replace(model, num_layers=7), ParallelConfig(pp=2, vpp=2))


@pytest.mark.parametrize("num_layers", range(1, 40))
def test_layers_of_stages(num_layers):
    """All layers, equal stages but for the first and the last, and neither of these beyond the others."""
    for pp in range(1, num_layers + 1):
        stages = layers_of_stages(num_layers, pp)
        assert len(stages) == pp and sum(stages) == num_layers
        assert len(set(stages[1:-1])) <= 1 and max(stages) == -(-num_layers // pp)
        assert num_layers % pp or len(set(stages)) == 1


def test_experts_and_parallel_sizes(folders):
    """4 experts of ffn 24; the dense ffn size of the config, 48, does not count."""
    moe, dense = read_hf_config(folders / "qwen3_moe"), read_hf_config(folders / "qwen2")
    assert moe.experts == Experts(number=4, ffn_size=24, router=Router(chosen=2, normalised=True))
    check_parallel(moe, ParallelConfig(dp=4, ep=4))
    check_parallel(moe, ParallelConfig(tp=2, sp=True))
    with pytest.raises(UserError, match="parallel.ep = 3: must divide the model's 4 experts; use one of 1, 2, 4$"):
        check_parallel(moe, ParallelConfig(dp=3, ep=3))
    with pytest.raises(UserError, match="parallel.ep = 2: qwen2 has no experts"):
        check_parallel(dense, ParallelConfig(dp=2, ep=2))
    with pytest.raises(UserError, match="parallel.sp = False: megatron-core trains experts at tp > 1 with sp only"):
        check_parallel(moe, ParallelConfig(tp=2))
    check_parallel(moe, ParallelConfig(tp=2, sp=True, etp=1, ep=2))
    with pytest.raises(UserError, match="parallel.etp = 1: qwen2 has no experts"):
        check_parallel(dense, ParallelConfig(tp=2, etp=1))
    for parallel, why in {
        "{tp: 2, sp: true, etp: 4, dp: 2, ep: 2}": "parallel.etp = 4: must divide parallel.tp = 2",
        "{tp: 2, sp: true, etp: 1}": "parallel.etp = 1: megatron-core 0.16.1 does not reduce .*; set parallel.ep > 1",
        "{tp: 2, sp: true, etp: 1, ep: 4}": r"parallel.ep = 4: must divide parallel.tp \* dp \* cp / etp = 2",
    }.items():
        sections = {"model": {"path": "m"}, "data": {"source": "task:cipher"}, "parallel": yaml.safe_load(parallel)}
        with pytest.raises(UserError, match=why):
            Config.build(sections)
    with pytest.raises(UserError, match="parallel.ep = 2: must divide parallel.dp = 3"):
        Config.build({"model": {"path": "m"}, "data": {"source": "task:cipher"}, "parallel": {"dp": 3, "ep": 2}})


def test_an_attention_window_bounds_the_length(edited):
    windowed = read_hf_config(edited("mistral", sliding_window=64))
    assert windowed.attention.window == 64
    check_context(windowed, 64)
    with pytest.raises(UserError, match=r"max_response_tokens = 65: the model attends to 64 tokens only"):
        check_context(windowed, 65)
    assert read_hf_config(edited("mistral", sliding_window=128)).attention.window is None, "as long as the positions"


def test_places_in_a_sharded_checkpoint(folders):
    moe, dense = read_hf_config(folders / "qwen3_moe"), read_hf_config(folders / "qwen2")
    place = place_of(moe, "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight")
    assert (place.name, place.index) == ("decoder.layers.mlp.experts.experts.linear_fc1.weight", (1, 3))
    assert place == place_of(moe, "decoder.layers.1.mlp.experts.linear_fc1.weight3")
    assert (place.leading, place.blocks, place.is_vocabulary) == ((2, 4), 2, False)
    assert place_of(moe, "decoder.layers.0.pre_mlp_layernorm.weight").name == "decoder.layers.pre_mlp_layernorm.weight"
    norm = place_of(dense, "decoder.layers.0.pre_mlp_layernorm.weight")
    assert norm.name == "decoder.layers.mlp.linear_fc1.layer_norm_weight"
    assert place_of(dense, "embedding.word_embeddings.weight") == Place(
        "embedding.word_embeddings.weight", (), (), is_vocabulary=True
    )
    with pytest.raises(UserError, match="qwen3_moe with 2 layers and 4 experts has none of that name"):
        place_of(moe, "decoder.layers.0.mlp.experts.local_experts.4.linear_fc1.weight")


@pytest.mark.parametrize(
    ("vocab", "tp", "padded"), [(101, 1, 104), (101, 2, 112), (104, 1, 104), (5, 4, 32), (151_936, 8, 151_936)]
)
def test_padded_vocab_size(vocab, tp, padded):
    assert padded_vocab_size(vocab, tp) == padded


# --------------------------------------------------------------------------------------------- reading, writing
def test_weights_that_do_not_fit_are_listed(folders, tmp_path):
    shutil.copytree(folders / "qwen3", tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.router.weight"] = torch.zeros(2)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)  # of old checkpoints: ignored
    tensors["lm_head.weight"] = torch.zeros(100, 32)
    save_file(tensors, tmp_path / "bad" / "model.safetensors")
    with pytest.raises(UserError) as caught:
        check_weights(read_hf_config(tmp_path / "bad"), HFReader(tmp_path / "bad"))
    assert caught.value.field == "model.path"
    assert caught.value.remedy == (
        "its weights do not fit its config.json; missing: model.norm.weight; "
        "unexpected: model.layers.0.mlp.router.weight; "
        "wrong shape: lm_head.weight (100, 32) instead of (101, 32)"
    )


def test_a_long_list_is_cut(folders):
    """Two layers too few: 24 tensors are missing, eight are named."""
    model = dataclasses.replace(read_hf_config(folders / "qwen2"), num_layers=4)
    with pytest.raises(
        UserError, match=r"missing: model.layers.2.input_layernorm.weight, ([^,]*, ){6}[^,]* and 16 more$"
    ):
        check_weights(model, HFReader(folders / "qwen2"))


def export(folder, template, out, **options):
    model, reader = read_hf_config(template), HFReader(folder)
    with HFWriter(out, template, model, **options) as writer:
        for name in reversed(reader.names()):
            writer.add(name, reader.slice(name, 0, 0, reader.shape(name)[0]))
    return out


@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000])
def test_written_folders_load_in_transformers(folders, tmp_path, max_shard_bytes):
    template = tmp_path / "template"
    shutil.copytree(folders / "qwen3_tied", template)
    carried = {"tokenizer.json": "{}", "tokenizer_config.json": "{}", "chat_template.jinja": "x", "merges.txt": "y"}
    carried |= {"README.md": "a card", "LICENSE": "a licence", "additional_chat_templates/tools.jinja": "z"}
    (template / "additional_chat_templates").mkdir()
    for file, text in (carried | {"pytorch_model.bin": "old weights", ".gitattributes": "hidden"}).items():
        (template / file).write_text(text)
    out = export(template, template, tmp_path / "runs" / "out", max_shard_bytes=max_shard_bytes)
    assert {file for file in carried if (out / file).read_text() == carried[file]} == set(carried)
    assert not (out / "pytorch_model.bin").exists() and not (out / ".gitattributes").exists()
    assert (out / "generation_config.json").exists()
    shards = sorted(file.name for file in out.glob("*.safetensors"))
    if max_shard_bytes == 2**30:
        assert shards == ["model.safetensors"]
    else:
        count = len(shards)
        assert count > 1 and shards[0] == f"model-00001-of-{count:05d}.safetensors"
        assert all((out / shard).stat().st_size < 20_000 + 4_000 for shard in shards)  # data and a header
    original, back = (AutoModelForCausalLM.from_pretrained(folder) for folder in (template, out))
    for (name, expected), actual in zip(original.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(expected, actual), name
    # and the sharded folder reads like the single file
    reader, again = HFReader(template), HFReader(out)
    assert set(reader.names()) == set(again.names())
    check_weights(read_hf_config(out), again)
    assert [file.name for file in out.parent.iterdir()] == ["out"]


def test_config_states_the_written_dtype(folders, tmp_path):
    """A bfloat16 run of a float32 template must not load as float32."""
    template, out = folders / "qwen2", tmp_path / "out"
    reader = HFReader(template)
    with HFWriter(out, template, read_hf_config(template)) as writer:
        for name in reader.names():
            writer.add(name, reader.slice(name, 0, 0, 999).to(torch.bfloat16))
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


def test_a_failed_export_leaves_the_old_folder(folders, tmp_path):
    template, out = folders / "qwen2", tmp_path / "out"
    export(template, template, out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="out = .*: exists already; choose another folder"):
        export(template, template, out)
    model = read_hf_config(template)
    with pytest.raises(KeyboardInterrupt), HFWriter(out, template, model, overwrite=True) as writer:
        writer.add("model.norm.weight", torch.zeros(32))
        raise KeyboardInterrupt
    with pytest.raises(AssertionError, match="tensors never came: model.embed_tokens.weight, "):
        with HFWriter(out, template, model, overwrite=True) as writer:
            writer.add("model.norm.weight", torch.zeros(32))
    assert (out / "model.safetensors").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    export(folders / "qwen2", template, out, overwrite=True)
    assert (out / "model.safetensors").exists() and [file.name for file in tmp_path.iterdir()] == ["out"]


def test_the_writer_refuses_wrong_tensors(folders, tmp_path):
    template = folders / "qwen2_tied"
    model = read_hf_config(template)
    with HFWriter(tmp_path / "out", template, model) as writer:
        with pytest.raises(AssertionError, match="lm_head.weight is no tensor of this model"):
            writer.add("lm_head.weight", torch.zeros(101, 32))
        with pytest.raises(AssertionError, match=r"model.norm.weight \(31,\) != \(32,\)"):
            writer.add("model.norm.weight", torch.zeros(31))
        writer.add("model.norm.weight", torch.zeros(32))
        with pytest.raises(AssertionError, match="model.norm.weight came twice"):
            writer.add("model.norm.weight", torch.zeros(32))
        for name, shape in hf_shapes(model).items():
            if name != "model.norm.weight":
                writer.add(name, torch.zeros(shape))
    with pytest.raises(UserError, match="template = .*: holds no config.json"):
        HFWriter(tmp_path / "other", tmp_path, model)


def test_added_tensors_may_change_afterwards(folders, tmp_path):
    """Live parameters share one buffer, and the next optimizer step writes into it."""
    template = folders / "qwen2"
    model = read_hf_config(template)
    shapes = hf_shapes(model)
    buffer = torch.ones(max(torch.Size(shape).numel() for shape in shapes.values()))
    with HFWriter(tmp_path / "out", template, model) as writer:
        for name, shape in shapes.items():
            writer.add(name, buffer[: torch.Size(shape).numel()].view(shape))
        buffer.zero_()
    assert all((tensor == 1).all() for tensor in load_file(tmp_path / "out" / "model.safetensors").values())


def test_a_missing_or_torn_shard_is_named(folders, tmp_path):
    out = export(folders / "qwen3", folders / "qwen3", tmp_path / "out", max_shard_bytes=20_000)
    last = sorted(out.glob("*.safetensors"))[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=f"{last.name}: not a whole safetensors file"):
        check_weights(read_hf_config(out), HFReader(out))
    last.unlink()
    with pytest.raises(UserError, match=f"{last.name}: named by the index but not there"):
        check_weights(read_hf_config(out), HFReader(out))
