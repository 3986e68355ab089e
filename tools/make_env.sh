#!/usr/bin/env bash
# Makes or updates one of the virtual environments:  tools/make_env.sh NAME, one of those in the `case` below.
# trainer-kernels adds Transformer Engine to a GPU trainer's.
# Called by the Makefile and by `owpo setup-engine`. Variables: PYTHON, the interpreter to use; TORCH_CPU_INDEX, where
# PyTorch's CPU wheels are (default: the Makefile's); ENGINE_DIR, the folder of SGLang's environment.
# The wheel carries this file, beside the Makefile and requirements/, in owpo_megatron/shipped/.
set -euo pipefail
cd "$(dirname "$0")/.."

names="trainer|engine|trainer-gpu|engine-gpu|trainer-kernels|nemo|sinks|peers|agents|docs"
name=${1:?$names}
case $name in
    trainer | trainer-gpu | trainer-kernels) dir=.venv ;;
    engine | engine-gpu) dir=${ENGINE_DIR:-.venv-engine} ;;
    nemo) dir=.venv-nemo ;;
    sinks) dir=.venv-sinks ;;
    peers) dir=.venv-peers ;;
    agents) dir=.venv-agents ;;
    docs) dir=.venv-docs ;;
    *) echo "usage: $0 $names" >&2; exit 2 ;;
esac
case $name in # an update keeps the kind
    trainer | engine) [ ! -e "$dir/.gpu" ] || name=$name-gpu ;;
esac
base_python=${PYTHON:-python3}
python=$dir/bin/python
log=$dir/setup.log
torch_version=$(sed -n 's/^torch==\([0-9.]*\)$/\1/p' requirements/engine-cpu.txt)
TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-$(sed -n 's/^TORCH_CPU_INDEX ?= //p' Makefile)}
plugin=owpo_megatron/sglang_cpu
[ -d "$plugin" ] || plugin=../sglang_cpu # inside the wheel
began=$SECONDS

say() { printf '[%-7s] %s\n' "$name" "$*"; }
die() { say "FAILED: $*" >&2; exit 1; }

# Runs a command with its output in the log; shows the end of the log when it fails.
quietly() {
    local what=$1 start=$SECONDS
    shift
    say "$what ..."
    if ! "$@" >>"$log" 2>&1; then
        tail -n 25 "$log" | sed "s/^/[$name] | /" >&2
        die "$what (whole log: $log)"
    fi
    say "$what: done in $((SECONDS - start)) s"
}

pip() { "$python" -m pip --disable-pip-version-check "$@"; }

make_venv() {
    mkdir -p "$(dirname "$dir")"
    "$base_python" -m venv --clear "$dir" >/dev/null 2>&1 && return
    # Debian's python3 without python3-venv has no ensurepip, but its pip can fill an environment from outside.
    rm -rf "$dir"
    "$base_python" -m venv --without-pip "$dir"
    "$base_python" -m pip --python "$python" install --quiet pip
}

# The CPU build of torch: found where pip is configured to look (at once, or not at all), else on PyTorch's CPU index.
# Elsewhere than on x86-64 Linux the plain wheel may be the CPU build; `check_torch` decides.
install_torch() {
    pip install --quiet --no-deps "torch==$torch_version+cpu" && return
    pip install --quiet --no-deps --index-url "$TORCH_CPU_INDEX" "torch==$torch_version+cpu" && return
    [ "$(uname -sm)" = "Linux x86_64" ] && return 1
    pip install --quiet --no-deps "torch==$torch_version"
}

ready() { # the end
    touch "$dir/.made"
    case $name in *-gpu) touch "$dir/.gpu" ;; esac
    say "ready: $dir, $((SECONDS - began)) s in all"
    exit
}

see_the_trainer() { # what this environment lacks comes from .venv
    site=$("$python" -c 'import site; print(site.getsitepackages()[0])')
    trainer_site=$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')
    echo "$trainer_site" >"$site/trainer.pth"
}

check_torch() {
    "$python" -c 'import sys, torch; sys.exit(torch.version.cuda and f"torch {torch.__version__} is a CUDA build")'
}

command -v "$base_python" >/dev/null || die "$base_python: no such command; run make setup PYTHON=/path/to/python3"
version=$("$base_python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
    3.10 | 3.11 | 3.12) ;;
    *) die "$base_python is Python $version; 3.10, 3.11 or 3.12 is needed: make setup PYTHON=python3.11" ;;
esac

case $name in
    *-gpu | trainer-kernels)
        [ "$version" = 3.12 ] || die "the GPU packages were resolved for Python 3.12, not $version: make setup-gpu PYTHON=python3.12"
        ;;
esac
if [ "$name" = trainer-kernels ]; then
    [ -e "$dir/.gpu" ] || die "$dir is no GPU environment: make setup-gpu first"
    command -v nvcc >/dev/null || die "nvcc, of CUDA 13, is not on the path: the layers run without these kernels, slower"
fi

have=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true)
case $name in *-gpu) [ -e "$dir/.gpu" ] || have= ;; esac # pip would keep a CPU build of the same version
if [ "$have" = "$version" ]; then
    say "updating $dir (Python $version)"
else
    say "making $dir with Python $version"
    make_venv || die "cannot make a virtual environment; on Debian or Ubuntu: apt install python3-venv python3-pip"
fi
: >"$log"

if [ "$name" = docs ]; then # mkdocs reads the sources; it imports none
    [ "$version" != 3.10 ] || die "the site's packages need Python 3.11 or 3.12: make docs PYTHON=python3.11"
    quietly "packages of requirements/docs.txt" pip install --quiet --no-deps -r requirements/docs.txt
    ready
fi

if [ "$name" = nemo ]; then # submits jobs, computes nothing: no torch
    quietly "packages of requirements/nemo.txt" pip install --quiet --no-deps --no-compile -r requirements/nemo.txt
    quietly "owpo_megatron itself, editable, without what the trainer needs" \
        pip install --quiet --no-deps --no-build-isolation -e .
    quietly "check that NeMo-Run can be imported" "$python" -c "import nemo_run, owpo_megatron.launch.nemo.pipeline"
    ready
fi

if [ "$name" = sinks ]; then # trackers, and what the configuration imports: no torch
    quietly "packages of requirements/sinks.txt" pip install --quiet --no-deps --no-compile -r requirements/sinks.txt
    quietly "check that the trackers can be imported" "$python" -c "import mlflow, trackio, wandb"
    ready
fi

if [ "$name" = peers ]; then # other libraries' losses; torch, transformers and the project are those of .venv
    see_the_trainer
    quietly "packages of requirements/peers.txt" pip install --quiet --no-deps --no-compile -r requirements/peers.txt
    quietly "check that the peers can be imported" "$python" -c "import trl, verl.trainer.ppo.core_algos"
    ready
fi

if [ "$name" = agents ]; then # what uses the chat protocol; torch and the project are those of .venv
    [ "$version" != 3.10 ] || die "verifiers needs Python 3.11 or 3.12: make agents PYTHON=python3.11"
    see_the_trainer
    quietly "packages of requirements/agents.txt" pip install --quiet --no-deps --no-compile -r requirements/agents.txt
    quietly "check that they can be imported" "$python" -c "import openai, verifiers.v1"
    ready
fi

if [ "$name" = engine-gpu ]; then # resolved for Python 3.12, never run
    quietly "packages of requirements/engine-gpu.txt" pip install --quiet -r requirements/engine-gpu.txt
    ready
fi

if [ "$name" = trainer-gpu ]; then # never run on a GPU; Transformer Engine is trainer-kernels
    quietly "packages of requirements/trainer-gpu.txt" pip install --quiet -r requirements/trainer-gpu.txt
    quietly "owpo_megatron itself, editable" pip install --quiet --no-deps --no-build-isolation -e .
    ready
fi

if [ "$name" = trainer-kernels ]; then # never run on a GPU
    # The headers of the CUDA libraries that came with torch: cuDNN's and NCCL's are not part of CUDA's toolkit.
    CPATH=$("$python" -c 'import glob, nvidia; print(":".join(sorted(glob.glob(nvidia.__path__[0] + "/*/include"))))')
    # It asks GitHub for a wheel first, where none is made for this torch.
    export CPATH NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS="${MAX_JOBS:-$(nproc)}"
    quietly "Transformer Engine (compiles 28 C++ files)" \
        pip install --quiet --no-deps --no-build-isolation -r requirements/trainer-kernels.txt
    quietly "check that Transformer Engine can be imported" "$python" -c "import transformer_engine.pytorch"
    ready
fi

quietly "torch $torch_version, CPU build" install_torch
constraints=$dir/constraints.txt
"$python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >"$constraints"

if [ "$name" = trainer ]; then
    quietly "packages of requirements/trainer-cpu.txt" \
        pip install --quiet -c "$constraints" -r requirements/trainer-cpu.txt
    quietly "owpo_megatron itself, editable" \
        pip install --quiet -c "$constraints" --no-build-isolation -e ".[dev]"
else
    quietly "packages of requirements/engine-cpu.txt (SGLang's, a few minutes)" \
        pip install --quiet -c "$constraints" -r requirements/engine-cpu.txt
    quietly "packages of requirements/engine-cpu-nodeps.txt" \
        pip install --quiet --no-deps -r requirements/engine-cpu-nodeps.txt
    # From a copy: a build leaves files beside the sources, and an installed package may be read-only.
    sources=$(mktemp -d)
    cp -R "$plugin/." "$sources"
    quietly "SGLang's CPU plug-in" pip install --quiet --no-deps --no-build-isolation "$sources"
    rm -rf "$sources"
fi

quietly "check that torch is a CPU build" check_torch
ready
