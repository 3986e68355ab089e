"""Python and the packages of this environment: there, at the tested version, and content with each other."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

from owpo_megatron.doctor.facts import torch_facts
from owpo_megatron.doctor.finding import Finding, Scope

OURS = "owpo_megatron"
PINNED = ("torch", "megatron-core", "transformers", "math-verify")
SETUP = "run `make setup`"


def packages(scope: Scope) -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    supported = (3, 10) <= sys.version_info[:2] <= (3, 12)
    yield Finding("python", "ok" if supported else "warn", python, "" if supported else "3.10 to 3.12 are tested")
    try:
        wanted = _requirements(OURS)
    except metadata.PackageNotFoundError:
        yield Finding(
            OURS, "fail", "is not installed here, so what it needs is not known", f"{SETUP}, or pip install ."
        )
        return
    findings = [_found(requirement) for requirement in wanted]
    yield from (one for one in findings if one.what in PINNED or one.status != "ok")
    yield from _conflicts({one.what for one in findings if one.status == "fail"})
    content = sum(one.status == "ok" for one in findings)
    yield Finding("packages", "ok", f"{content} of {len(findings)} as needed")


def _requirements(name: str) -> list[Requirement]:
    """Requirements of a distribution in this environment, without extras."""
    parsed = [Requirement(text) for text in metadata.requires(name) or []]
    return [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _found(requirement: Requirement) -> Finding:
    name, have = requirement.name, _version(requirement.name)
    if have is None:
        return Finding(name, "fail", "not installed", _install(requirement))
    if name in PINNED:
        return _pinned(requirement, have)
    if not requirement.specifier.contains(have, prereleases=True):
        return Finding(name, "fail", f"{have}; {requirement.specifier} is needed", _install(requirement))
    return Finding(name, "ok", have)


def _install(requirement: Requirement) -> str:
    return f'{SETUP}, or pip install "{requirement}"'


def _pinned(requirement: Requirement, have: str) -> Finding:
    """Internals of these are relied on: another minor version is refused, another patch or build is reported."""
    name, want = requirement.name, str(requirement.specifier).removeprefix("==")
    remedy = _install(requirement)
    if name == "torch":
        facts = torch_facts()
        if "error" in facts:
            return Finding(name, "fail", f"{have} does not import: {facts['error']}", remedy)
        if facts["version"].partition("+")[0] != have.partition("+")[0]:
            detail = f"{have} is installed, but {facts['version']} is imported, from {facts['file']}"
            return Finding(name, "fail", detail, "take its folder out of PYTHONPATH and the working directory")
    if Version(have).release[:2] != Version(want).release[:2]:
        return Finding(name, "fail", f"{have}; {want} is needed", remedy)
    if Version(have).public != want:
        return Finding(name, "warn", f"{have}; {want} is tested", remedy)
    return Finding(name, "ok", have)


def _conflicts(told: set[str]) -> Iterator[Finding]:
    """Requirements of the packages that we build on, in another version: pip installs such a set with a warning."""
    for owner in PINNED:
        if _version(owner) is None:
            continue
        for requirement in _requirements(owner):
            name, have = requirement.name, _version(requirement.name)
            if name in told or (have is None and name.startswith(("nvidia-", "cuda-", "triton"))):
                continue  # the latter: of torch's CUDA build, whose libraries may come from the system
            if have is None:
                yield Finding(name, "fail", f"not installed; {owner} needs it", _install(requirement))
            elif not requirement.specifier.contains(have, prereleases=True):
                detail = f"{have}; {owner} needs {requirement.specifier}"
                yield Finding(name, "fail", detail, _install(requirement))
