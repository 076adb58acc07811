"""What this machine has: devices, precisions, backends and packages, and for everything that is off, why."""

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.table import Table

BASE = (
    "torch",
    "numpy",
    "safetensors",
    "pydantic",
    "tomli-w",
    "rich",
    "matplotlib",
    "jinja2",
    "tensorboard",
    "tokenizers",
    "tiktoken",
)
OPTIONAL = {
    "triton": "our kernels for experts, and torch.compile, on NVIDIA GPUs",
    "pyarrow": "Parquet files as a source of text",
    "lm-eval": "python -m evals.harness: lm-evaluation-harness on checkpoints",
    "transformers": "tests and benchmarks against its models",
    "megatron-core": "a test that it reads our shards",
    "flash-attn": 'attention.backend = "flash", version 2; it needs nvcc to install',
    "flash-attn-4": 'attention.backend = "flash", version 4, on Hopper and Blackwell GPUs',
    "xformers": 'attention.backend = "xformers"',
    "grouped_gemm": 'experts = "megablocks_grouped"; it needs nvcc to install',
    "megablocks": 'experts = "megablocks_sparse"; it needs triton below 3.2',
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for."""

    part: str
    name: str
    is_on: bool
    detail: str


def doctor() -> list[Finding]:
    """Everything that was looked for, in the order it is shown; what fails to load is off, with its reason."""
    findings = []
    for part, probe in PROBES.items():
        try:
            findings += [Finding(part, name, is_on, detail) for name, is_on, detail in probe()]
        except Exception as error:  # a broken installation is what a doctor is for
            findings.append(Finding(part, "all", False, f"{type(error).__name__}: {error}"))
    return findings


def show(findings: list[Finding], console: Console | None = None) -> None:
    """Print the findings as a table, a section for each part."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=140)
    table = Table(title="What this machine has", title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("part", style="bold", no_wrap=True)
    table.add_column("name", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("detail", overflow="fold")
    before = ""
    for finding in findings:
        if before and finding.part != before:
            table.add_section()
        state = "[green]on[/]" if finding.is_on else "[yellow]off[/]"
        table.add_row(finding.part if finding.part != before else "", finding.name, state, _escaped(finding.detail))
        before = finding.part
    console.print(table)


Probe = Iterator[tuple[str, bool, str]]


def _system() -> Probe:
    from run.environment import processor

    yield "python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    yield "processor", True, f"{processor()}, {cores} cores for this process"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield "memory", True, f"{memory:.1f} GiB"


def _devices() -> Probe:
    import torch

    from run.start import choose_device, choose_dtype

    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs alone"
    yield "torch", True, f"{torch.__version__}, built for {built_for}"
    yield "cpu", True, f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    has_amx = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
    yield "cpu AMX", has_amx, "bf16 is faster than fp32" if has_amx else "this processor has none; fp32 is the faster"
    if not torch.cuda.is_available():
        why = "torch finds no NVIDIA GPU or no driver" if torch.version.cuda else "this torch was built without CUDA"
        yield "cuda", False, why
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        capability = f"compute capability {facts.major}.{facts.minor}"
        yield f"cuda:{index}", True, f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {capability}"
    device = choose_device("auto")
    precision = str(choose_dtype("auto", device)).removeprefix("torch.")
    yield "auto", True, f'device="auto" is {device.type}, precision="auto" is {precision} there'


def _ranks() -> Probe:
    import torch.distributed as dist

    for backend, is_on in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())):
        yield backend, is_on, "several ranks with torchrun" if is_on else "this torch was built without it"


def _attention() -> Probe:
    from attention.contract import Needs
    from attention.core import explain
    from run.start import choose_device, choose_dtype

    device = choose_device("auto")
    full = Needs(device.type, choose_dtype("auto", device), documents=True, channels=128, training=True)
    usual = {"full layers": full, "window layers": replace(full, window=True), "softcap": replace(full, softcap=True)}
    yield from explain(usual)


def _experts() -> Probe:
    from moe import experts
    from run.start import choose_device, choose_dtype

    device = choose_device("auto")
    dtype = choose_dtype("auto", device)
    chosen = experts.choose("auto", device.type, dtype, 256, 256)
    for name, matmul in experts.MATMULS.items():
        reason = experts.unavailable(name, device.type, dtype, 256, 256)
        usual = f" ({device.type}: what auto takes)" if name == chosen else ""
        yield name, reason is None, reason or f"{_first_sentence(matmul)}{usual}"


def _base_packages() -> Probe:
    for name in BASE:
        found = _version(name)
        yield name, found is not None, found or f"missing and needed: pip install {name}"


def _optional_packages() -> Probe:
    for name, purpose in OPTIONAL.items():
        found = _version(name)
        yield name, found is not None, f"{found}: {purpose}" if found else f"not installed: {purpose}"


PROBES: dict[str, Callable[[], Probe]] = {
    "system": _system,
    "devices": _devices,
    "ranks": _ranks,
    "attention": _attention,
    "experts": _experts,
    "packages": _base_packages,
    "optional": _optional_packages,
}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _first_sentence(thing: object) -> str:
    return (thing.__doc__ or "").strip().partition("\n")[0].rstrip(".")


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
