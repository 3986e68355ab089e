#!/usr/bin/env python3
"""Compare the curves of two runs, or of two commits, number by number; name the first difference.

    tools/compare_curves.py A B [--tolerance 1e-5]

A and B are each one of
    a run folder, or its metrics.jsonl     runs/quickstart
    a golden file and one of its curves    tests/data/golden/quickstart.json:quickstart   (or :recorded)
    a commit                               main~3    the quickstart's first 13 steps, replayed from recorded rollouts
    tree                                   the same with the working tree

Exit status: 0 no difference, 1 a difference, 2 A or B cannot be read. With tolerance 0, the default, numbers must be
equal bit for bit. On recorded rollouts, with one rank and one thread, a commit gives the same bits each time on one
kind of machine. Elsewhere it differs by rounding: with other vector units (AVX2, none) the 13 steps agree within 1e-5.

    tools/compare_curves.py --record tests/data/golden/quickstart.json --run runs/quickstart

writes the golden file anew: `recorded` from the working tree, `quickstart` from a finished quickstart.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "data" / "golden"
RECORDED_STEPS = 13  # the last one after the first hard swap; the rollouts of no later step are kept

# What the trainer computes. Left out: seconds, and what the engine's rounding enters (mismatch).
FIELDS = (
    *("reward_mean", "loss", "grad_norm", "ratio_mean", "kl_old", "clip_fraction", "entropy", "w_mean", "w_at_low"),
    *("w_at_high", "kl_ref", "abs_delta", "lr", "n_active", "ref_id", "ref_step", "groups", "groups_dropped", "rounds"),
    *("updates", "tokens", "active_tokens", "prompts_seen", "policy_version"),
)
Curve = list[dict[str, Any]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", nargs="*", metavar="A B")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="largest relative or absolute difference (0: bits)"
    )
    parser.add_argument("--record", type=Path, metavar="FILE", help="write a golden file instead")
    parser.add_argument("--run", type=Path, metavar="RUN_DIR", help="finished quickstart for --record")
    options = parser.parse_args(arguments)
    if options.record is not None:
        if options.run is None or options.curves:
            parser.error("--record FILE needs --run RUN_DIR, and no A and B")
        record(options.record, options.run)
        return 0
    if len(options.curves) != 2:
        parser.error("give two curves")
    try:
        first, second = (read(text) for text in options.curves)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"{error}", file=sys.stderr)
        return 2
    differences = compare(first, second, options.tolerance)
    if not differences:
        print(f"{len(first)} steps, no difference" + (f" above {options.tolerance:g}" if options.tolerance else ""))
        return 0
    print("first difference:", differences[0])
    for difference in differences[1:6]:
        print("                 ", difference)
    print(f"{len(differences)} numbers differ")
    return 1


def compare(first: Curve, second: Curve, tolerance: float = 0.0) -> list[str]:
    """Differences in the order of steps, then in the number of steps; [] where there are none."""
    out = []
    for ours, theirs in zip(first, second, strict=False):
        if ours["step"] != theirs["step"]:
            return [*out, f"step {ours['step']} against step {theirs['step']}"]
        for field in FIELDS:
            a, b = ours.get(field), theirs.get(field)
            if a == b or (a is not None and b is not None and _close(a, b, tolerance)):
                continue
            size = "" if a is None or b is None else f" (relative {abs(a - b) / max(abs(a), abs(b)):.1e})"
            out.append(f"step {ours['step']}: {field} {a!r} against {b!r}{size}")
    if len(first) != len(second):
        out.append(f"{len(first)} steps against {len(second)}")
    return out


def _close(a: float, b: float, tolerance: float) -> bool:
    if math.isnan(a) and math.isnan(b):
        return True
    return tolerance > 0 and math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)


def read(text: str) -> Curve:
    """The step lines of a curve. Raises OSError or ValueError where it cannot be read."""
    if text == "tree":
        return replay(ROOT)
    name, _, section = text.partition(":")
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        content = json.loads(path.read_text())
        if section not in content:
            raise ValueError(f"{text}: give one of {name}:{{recorded,quickstart}}")
        return content[section]
    if (path / "metrics.jsonl").is_file():
        path = path / "metrics.jsonl"
    if path.is_file():
        return steps_of(path)
    if path.exists():
        raise ValueError(f"{path}: holds no metrics.jsonl")
    return replay_commit(text)


def steps_of(metrics: Path) -> Curve:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [{name: line[name] for name in ("step", *FIELDS) if name in line} for line in lines if "loss" in line]


def replay_commit(commit: str) -> Curve:
    """The recorded curve with another commit's code. Raises ValueError where git does not know it."""
    git = ["git", "-C", str(ROOT)]
    known = subprocess.run([*git, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"], capture_output=True)
    if known.returncode:
        raise ValueError(f"{commit}: neither a run, a golden file nor a commit")
    with tempfile.TemporaryDirectory(prefix="owpo-commit-") as folder:
        tree = Path(folder) / "tree"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            return replay(tree)
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)


def replay(tree: Path) -> Curve:
    """Train the quickstart's first steps on its recorded rollouts: one rank, one thread, no engine. About 10 s.

    Args:
        tree: checkout whose code trains; model, rollouts and settings are always this one's.
    """
    with tempfile.TemporaryDirectory(prefix="owpo-replay-") as folder:
        here = Path(folder)
        config = here / "replay.yaml"
        config.write_text(yaml.safe_dump(settings(here)))
        command = [sys.executable, "-m", "owpo_megatron.cli.main", "train", "-c", str(config)]
        env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{tree}: the replay failed\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return steps_of(here / "runs" / "replay" / "metrics.jsonl")


def settings(here: Path) -> dict[str, Any]:
    """The quickstart's configuration for a replay; unpacks the rollouts into `here`."""
    rollouts = here / "rollouts"
    rollouts.mkdir()
    (rollouts / "step_000001.jsonl").write_bytes(lzma.decompress((GOLDEN / "rollouts.jsonl.xz").read_bytes()))
    raw = yaml.safe_load((ROOT / "examples" / "quickstart" / "config.yaml").read_text())
    raw |= {"name": "replay", "model": {"path": str(GOLDEN / "base_model")}, "parallel": {"tp": 1}}
    raw["rollout"] |= {"replay": str(rollouts)}
    raw["optimizer"] |= {"steps": RECORDED_STEPS}
    raw["eval"] = {"before": False, "after": False}
    raw["checkpoint"] = {"every": 0, "export_hf": False}
    return raw


def record(file: Path, run: Path) -> None:
    content = {"machine": machine(), "recorded": replay(ROOT), "quickstart": steps_of(run / "metrics.jsonl")}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=0) + "\n")
    print(f"written: {file}, {len(content['recorded'])} and {len(content['quickstart'])} steps")


def machine() -> dict[str, str]:
    """Properties that the last bits of a number depend on."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    models = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    sys.exit(main())
