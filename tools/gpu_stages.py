"""Stages of tools/gpu_check.sh; each adds rows to a file as soon as they are known. Exit status 77: not run here.

Every stage compares with float64, with the exact head or bit for bit, and fails beyond the bounds it prints.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch

ROOT = Path(__file__).parents[1]
NOT_RUN = 77
Row = dict[str, Any]


class Check:
    """One stage: where it runs and where its rows go."""

    def __init__(self, stage: str, device: str, rows: Path):
        self.stage, self.device, self.rows = stage, device, rows
        self.real = device == "cuda"

    def row(self, what: str, passed: bool = True, **values: Any) -> None:
        """Add a row; a failed one fails the stage at its end."""
        line: Row = {"stage": self.stage, "what": what, "passed": bool(passed)} | values
        with self.rows.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line)
        self.failed = getattr(self, "failed", False) or not passed


def not_run(reason: str) -> NoReturn:
    print(reason)
    sys.exit(NOT_RUN)


def needs(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        not_run(f"{module} is not installed")


# ---------------------------------------------------------------------------------------------------- stages
def machine(check: Check) -> None:
    """Device, and the versions here beside the GPU image's."""
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements" / "trainer-gpu.txt").read_text(), re.MULTILINE))
    pins |= dict(
        re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements" / "trainer-cpu.txt").read_text(), re.MULTILINE)
    )
    pins["torch"] = pins["torch"].partition("+")[0]
    for name in ("torch", "triton", "megatron-core", "transformers", "pydantic", "transformer-engine", "sglang"):
        try:
            here: str | None = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            here = None
        check.row(
            name, here=here, pinned=pins.get(name), differs=here is None or here.partition("+")[0] != pins.get(name)
        )
    if check.real:
        if not torch.cuda.is_available():
            not_run("torch sees no CUDA device")
        found = torch.cuda.get_device_properties(0)
        check.row("device", name=found.name, memory_bytes=found.total_memory, capability=f"{found.major}.{found.minor}")


def kernels(check: Check) -> None:
    """Every case of the Triton kernels and of the head made of them, compiled; interpreted in a rehearsal."""
    needs("pytest")
    needs("triton")
    files = ["tests/head/test_triton.py"] if check.real else ["tests/head/test_aot.py"]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *files], cwd=ROOT)
    check.row(", ".join(files), done.returncode == 0)


def head(check: Check) -> None:
    """The exact head in bfloat16 with dW into main_grad, against float64, at a small and a real shape."""
    from owpo_megatron.bench.head import ExactGradients, HeadProblem
    from owpo_megatron.head import Head
    from owpo_megatron.methods import make_method

    method = make_method("owpo")
    shapes = [(256, 128, 4099), (8192, 4096, 151936)] if check.real else [(64, 32, 515)]
    for tokens, hidden, vocab in shapes:
        dtype = torch.bfloat16 if check.real else torch.float32
        problem = HeadProblem.random(tokens, hidden, vocab, check.device, dtype)
        exact = ExactGradients(problem)
        for main_dtype in (torch.float32, torch.bfloat16):
            h_TH, weight_VH = problem.h_TH.clone().requires_grad_(), problem.weight_VH.clone().requires_grad_()
            weight_VH.main_grad = torch.zeros(weight_VH.shape, dtype=main_dtype, device=check.device)  # type: ignore[attr-defined]
            _reset_peak(check)
            out = Head(weight_VH).loss(h_TH, problem.target_T, problem.batch, method)
            out.loss_sum.backward()
            extra = _extra_bytes(check)
            again = Head(weight_VH).logprobs(h_TH.detach(), problem.target_T)
            assert h_TH.grad is not None
            error = exact.error(problem, method, (out.loss_sum, h_TH.grad, weight_VH.main_grad))  # type: ignore[attr-defined]
            scale = max(h_TH.grad.abs().max().item(), weight_VH.main_grad.abs().max().item())  # type: ignore[attr-defined]
            bound = (0.02 if check.real or main_dtype == torch.bfloat16 else 1e-3) * scale
            check.row(
                "loss", error < bound, shape=[tokens, hidden, vocab], main_grad=str(main_dtype), max_abs_error=error,
                bound=bound, extra_bytes=extra,
            )  # fmt: skip
            check.row("both passes give the same bits", torch.equal(again.logp_T, out.logp_T))
        del problem, exact


def fp8(check: Check) -> None:
    """The FP8 product against its simulation, and the fused FP8 head against the exact one."""
    from fp8_error_study import synthetic

    from owpo_megatron.bench.head import HeadProblem
    from owpo_megatron.head import Head, head_error
    from owpo_megatron.head.fp8 import _best_product, _Simulated
    from owpo_megatron.methods import make_method

    tokens, hidden, vocab = (4096, 4096, 151936) if check.real else (64, 64, 4096)
    problem = HeadProblem.random(tokens, hidden, vocab, check.device, torch.bfloat16)
    few_CH = problem.h_TH[:19]
    product = _best_product(problem.weight_VH)
    gap = (product(few_CH) - _Simulated(problem.weight_VH)(few_CH)).abs().max().item()
    check.row("FP8 product against its simulation", gap < 0.05, product=type(product).__name__, max_abs_gap=gap)
    h_CH, weight_VH = (value.to(check.device) for value in synthetic("A"))
    target_C = torch.distributions.Categorical(logits=h_CH.float() @ weight_VH.float().t()).sample()
    error = head_error(Head(weight_VH), h_CH, target_C)
    check.row(
        "refined against exact", error.acceptable, mean=error.mean, p99=error.p99, rows=error.rows,
        cosine_dh=error.dh.cosine, cosine_dw=error.dweight.cosine, norm_gap_dh=error.dh.norm_gap,
        norm_gap_dw=error.dweight.norm_gap,
    )  # fmt: skip
    method, found = make_method("owpo"), {}
    for mode in ("exact", "fp8_refined"):
        h_TH, weight_VH = problem.h_TH.clone().requires_grad_(), problem.weight_VH.clone().requires_grad_()
        batch = replace(problem.batch, old_mode=mode, ref_mode=mode)
        _reset_peak(check)
        began = time.perf_counter()
        Head(weight_VH).loss(h_TH, problem.target_T, batch, method, mode).loss_sum.backward()
        assert h_TH.grad is not None
        found[mode] = (h_TH.grad.float(), time.perf_counter() - began, _extra_bytes(check))
    (exact, *_), (refined, seconds, extra) = found["exact"], found["fp8_refined"]
    cosine = torch.nn.functional.cosine_similarity(exact.flatten().double(), refined.flatten().double(), dim=0).item()
    check.row("one fused step", cosine > 0.999, cosine_dh=cosine, first_call_seconds=seconds, extra_bytes=extra)


def ipc(check: Check) -> None:
    """Weights in GPU memory, read by another process."""
    needs("pytest")
    if not check.real:
        not_run("a CPU has no CUDA handles")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/sync/test_ipc.py"], cwd=ROOT
    )
    check.row("tests/sync/test_ipc.py", done.returncode == 0)


def step(check: Check) -> None:
    """Updates of OWPO on random samples: half a billion parameters, megatron's own layers, no engine."""
    needs("megatron.core" if importlib.util.find_spec("megatron") else "megatron")
    from tiny import build_policy, make_config, make_hf_model, random_samples

    from owpo_megatron.methods import make_method
    from owpo_megatron.policy import SlotReference

    fields = (
        dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, vocab_size=151936)
        if check.real
        else dict(vocab_size=96)
    )
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        model = make_hf_model(Path(folder) / "model", "qwen2", **fields)
        dtype = "bfloat16" if check.real else "float32"
        policy = build_policy(make_config(model, model={"dtype": dtype}, optimizer={"tokens_per_microbatch": 64}))
        check.row("model built", seconds=time.perf_counter() - began, kernels=policy.fused_kernels or "none on a CPU")
        method, reference = make_method("owpo"), SlotReference(policy)
        samples = random_samples(0, count=32, vocab_size=96, logps=False)
        logps = policy.logprobs(samples)
        check.row("log-probs twice, same bits", _same(logps, policy.logprobs(samples)))
        check.row("the reference is the policy at first, same bits", _same(logps, reference.logprobs(samples)))

        def update(number: int) -> Row:
            given = random_samples(number, count=32, vocab_size=96)
            old, ref = policy.logprobs(given), reference.logprobs(given)
            return policy.update(
                [replace(s, old_logp=o, ref_logp=r) for s, o, r in zip(given, old, ref, strict=True)], method
            )

        began = time.perf_counter()
        sums = update(1)
        check.row("update", sums["grad_norm"] > 0, grad_norm=sums["grad_norm"], seconds=time.perf_counter() - began)
        moved = policy.logprobs(samples)
        check.row(
            "the policy moved, the reference did not",
            not _same(logps, moved) and _same(logps, reference.logprobs(samples)),
        )
        reference.swap(1, "interval")
        check.row("after a swap the reference is the policy", _same(moved, reference.logprobs(samples)))
        update(2)
        check.row("and stays while the policy goes on", _same(moved, reference.logprobs(samples)))
        kept, state = policy.logprobs(samples), Path(folder) / "state"
        state.mkdir()
        policy.save(state)
        update(3)
        policy.restore(state, reference_is_policy=False)
        check.row("a restored state gives the same bits", _same(kept, policy.logprobs(samples)))
        if check.real:
            check.row("peak memory", bytes=torch.cuda.max_memory_allocated())


def bench(check: Check) -> None:
    """owpo bench head: the exact and the fused FP8 head, and peers that are installed."""
    shapes = "16384x4096x151936,16384x3584x151936" if check.real else "64x32x512"
    _bench(check, "head", "--device", check.device, "--shapes", shapes)


def swap(check: Check) -> None:
    """owpo bench swap: the hard swap against a copy."""
    needs("megatron")
    _bench(check, "swap", "--params", "500M" if check.real else "1M", "--rounds", "5")


def summary(check: Check) -> None:
    """Print every row as a table; adds none."""
    print("| stage | what | passed | values |\n|-|-|-|-|")
    for line in check.rows.read_text().splitlines():
        row = json.loads(line)
        values = ", ".join(f"{name} {_short(row[name])}" for name in row if name not in ("stage", "what", "passed"))
        print(f"| {row['stage']} | {row['what']} | {'yes' if row['passed'] else 'NO'} | {values} |")


# ---------------------------------------------------------------------------------------------------- shared
def _bench(check: Check, name: str, *options: str) -> None:
    needs("typer")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "-c", "from owpo_megatron.cli.main import main; main()", "bench", name, *options]
        done = subprocess.run([*command, "--json", str(file)], cwd=ROOT)
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
    for row in rows:
        check.row(name, "error" not in row or "not available" in row["error"], **row)
    check.row(f"owpo bench {name}", done.returncode == 0, rows=len(rows))


def _same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _reset_peak(check: Check) -> None:
    if check.real:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        check.before = torch.cuda.memory_allocated()  # type: ignore[attr-defined]


def _extra_bytes(check: Check) -> int | None:
    if not check.real:
        return None
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - check.before  # type: ignore[attr-defined]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


STAGES: dict[str, Callable[[Check], None]] = {
    one.__name__: one for one in (machine, kernels, head, fp8, ipc, step, bench, swap, summary)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE", help="JSON lines to add to")
    given = parser.parse_args()
    check = Check(given.stage, given.device, given.rows)
    STAGES[given.stage](check)
    return int(getattr(check, "failed", False))


if __name__ == "__main__":
    sys.exit(main())
