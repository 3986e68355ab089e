"""Render a job's files: sbatch script, node script for NeMo-Run, Kubernetes manifest. Templates are in templates/."""

from __future__ import annotations

import functools

import jinja2
import yaml

from owpo_megatron import __version__
from owpo_megatron.launch.job import Job, kubernetes_image, quoted


def render_sbatch(job: Job) -> str:
    """The one file that `owpo launch` submits."""
    return _render("job.sbatch.j2", job)


def render_node(job: Job) -> str:
    """The script that every node of a NeMo-Run job executes: its engines, its ranks, or both."""
    config = yaml.safe_dump(job.config.model_dump(mode="json"), sort_keys=False).strip()
    return _render("node.sh.j2", job, config=config)


def render_kubernetes(job: Job) -> str:
    """A Kubeflow PyTorchJob, and a Job of engines if they have nodes of their own."""
    assert job.launch.container is not None
    return _render("pytorchjob.yaml.j2", job, image=kubernetes_image(job.launch.container))


def _render(template: str, job: Job, **more: str) -> str:
    return _environment().get_template(template).render(job=job, launch=job.launch, version=__version__, **more)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("owpo_megatron.launch"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # shell and YAML: values pass through `quoted` and `tojson`
    )
    environment.filters["quoted"] = quoted
    return environment
