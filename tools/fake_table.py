"""Table of what ranks of a large run send in a step, and a check that ranks of a group do the same operations.

    .venv/bin/python tools/fake_table.py -c examples/qwen3-8b-base/config.yaml parallel.tp=4 parallel.dp=128

One process plays the ranks one after the other (fake_ranks.py): those of every place in tp, cp, pp and ep at two
data-parallel indices. It ends with exit code 1 where ranks of a group differ. MB are those of one microbatch size,
`optimizer.tokens_per_microbatch`; a GPU's attention exchanges other tensors over context-parallel ranks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fake_calls import differences, table
from fake_ranks import all_catalogues, record, representatives

from owpo_megatron.config import Config, hf_folder
from owpo_megatron.families import read_hf_config
from owpo_megatron.methods import make_method
from owpo_megatron.plan.trainer import trainer_memory


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("-c", "--config", type=Path, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", help="some ranks instead of all places at two dp indices")
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    config = Config.load(args.config, args.overrides)
    hf = read_hf_config(hf_folder(config.model.path))
    catalogues, records = all_catalogues(config, hf), []
    for rank in args.ranks or representatives(config.parallel):
        records.append(record(config, hf, rank, args.microbatches, catalogues))
        one = records[-1]
        print(f"rank {rank} {one.place}: {len(one.calls)} operations, {one.seconds:.1f} CPU s", flush=True)
    for stage in sorted({one.place["pp"] for one in records}):
        one = next(one for one in records if one.place["pp"] == stage)
        planned = trainer_memory(config, hf, False, make_method(config.algorithm).needs_reference)[stage]
        memory = ", ".join(
            f"{name} {size / 1e9:.3f} (plan {getattr(planned, name) / 1e9:.3f})" for name, size in one.memory.items()
        )
        print(f"\nrank {one.rank}, GB: {memory}\n\n| phase | operation | group | times | MB |\n|---|---|---|---|---|")
        print("\n".join(table(one)))
    found = differences(records)
    print("\n" + "\n".join(found or [f"{len(records)} ranks: all operations of every group are alike"]))
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
