"""Write a random-weight VoxCPM checkpoint in the real on-disk layout: tiny for tests, full size for the GPU bench.

`python -m tests.support.voxcpm_checkpoint.checkpoint OUT --arch voxcpm2 [--size full] [--stop never|always|STEPS]`

Sample rates, hops, patch sizes and special tokens are the real ones at both sizes, so the voxcpm package reads the
folder as it reads a download and makes as many samples per step. Speed does not depend on the values
of the weights; the full size has the dimensions of the released models (see `FULL`).
"""

import argparse
import contextlib
import io
import json
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import attrs

from gpuworker.engines.voxcpm.devices import import_voxcpm, known_warnings
from tests.support.voxcpm_checkpoint.dimensions import (
    FULL,
    Arch,
    Dimensions,
    Size,
    config_of,
    mid,
    tiny,
    vocabulary_size,
    write_tokenizer,
)

#: When speech ends. "never": only at the cap, exactly `min(int(tokens * ratio + 10), max_len)` steps.
#: "always": as early as possible, exactly `min(min_len + 2, cap)` steps. A number: about that many steps, which differ
#: by text and seed as those of a real model do.
Stop = Literal["never", "always"] | int

#: Target of the standard deviation of the speech: clearly not silence, and a tenth of full scale.
_LOUDNESS = 0.1
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
_SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16"}


@attrs.frozen
class Checkpoint:
    """A written checkpoint; `parameters` are those of the language models, encoder and decoder."""

    folder: Path
    parameters: int
    vae_parameters: int
    size_bytes: int


def write_checkpoint(
    folder: Path,
    arch: Arch,
    *,
    stop: Stop = "never",
    size: Size = "tiny",
    dtype: Literal["float32", "bfloat16"] | None = None,
    seed: int = 0,
    context: int | None = None,
) -> Checkpoint:
    """Write what `VoxCPM.from_pretrained(folder)` reads. The same arguments write the same bytes.

    Needs memory for the largest single tensor and the VAE, not for the model (full VoxCPM2: below 2 GiB).

    Args:
        folder: created if it does not exist.
        arch: `voxcpm2` (48 kHz), `voxcpm1.5` (44.1 kHz) or `voxcpm` (the 0.5B, 16 kHz).
        stop: when speech ends; a number works only for tiny ones, because it needs trial runs.
        size: `full` exists for voxcpm2 and voxcpm.
        dtype: type of the weights except the VAE's; by default bfloat16 for full ones, as released, else float32
            (bit-identical on any run of one machine).
        seed: the seed of the weights.
        context: length of the KV cache in tokens and patches; by default the released one (full), else 1,024.

    Raises:
        ValueError: there are no full dimensions of `arch`, or `stop` is a number for one that is not tiny.
    """
    if size == "full" and arch not in FULL:
        raise ValueError(f"the full dimensions of {arch} are unknown; known: {', '.join(FULL)}")
    if size != "tiny" and not isinstance(stop, str):
        raise ValueError(f"a {size} checkpoint stops 'never' or 'always': a number needs trial runs of the model")
    kind = dtype or ("bfloat16" if size == "full" else "float32")
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(folder)
    dimensions = _dimensions(arch, size, vocabulary, context or 1_024)
    if context is not None:
        dimensions = attrs.evolve(dimensions, context=context)
    config = config_of(arch, dimensions, kind)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    with quiet_voxcpm():
        vae_parameters = _write_vae(folder, config, seed)
        parameters = _write_weights(folder, config, kind, seed, "never" if isinstance(stop, int) else stop)
        if isinstance(stop, int):
            _write_stop_head(folder, dimensions.hidden, stop, seed)
    size_bytes = sum(file.stat().st_size for file in folder.iterdir())
    return Checkpoint(folder, parameters, vae_parameters, size_bytes)


def _dimensions(arch: Arch, size: Size, vocabulary: int, context: int) -> Dimensions:
    if size == "full":
        return FULL[arch]
    return tiny(vocabulary, context) if size == "tiny" else mid(vocabulary, context)


def parameter_count(arch: Arch, size: Size = "full") -> tuple[int, int]:
    """Parameters of a checkpoint, without writing it: of everything except the VAE, and of the VAE."""
    dimensions = _dimensions(arch, size, vocabulary_size(), 1_024)
    config = config_of(arch, dimensions, "bfloat16")
    with quiet_voxcpm():
        import torch

        with torch.device("meta"):
            model_class, config_class, vae_class = _classes(config)
            parsed = config_class.model_validate(config)
            vae = vae_class(config=parsed.audio_vae_config)
        model = _skeleton(model_class, parsed)
        return sum(v.numel() for v in model.state_dict().values()), sum(v.numel() for v in vae.state_dict().values())


@contextlib.contextmanager
def quiet_voxcpm() -> Iterator[None]:
    """Import and use voxcpm without its notes on stderr; of warnings, only its known deprecations are suppressed."""
    with known_warnings(), contextlib.redirect_stderr(io.StringIO()):
        import_voxcpm()
        yield


# -- weights -----------------------------------------------------------------------------------------------------


def _classes(config: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    if config["architecture"] == "voxcpm2":
        from voxcpm.model import voxcpm2

        return voxcpm2.VoxCPM2Model, voxcpm2.VoxCPMConfig, voxcpm2.AudioVAEV2
    from voxcpm.model import voxcpm

    return voxcpm.VoxCPMModel, voxcpm.VoxCPMConfig, voxcpm.AudioVAE


def _skeleton(model_class: Any, parsed: Any) -> Any:
    """The model without its VAE, its weights on the meta device: names and shapes, no memory."""
    import torch

    class NoTokens:
        vocab: Mapping[str, int] = {}

    class NoVae(torch.nn.Module):
        chunk_size, sample_rate = 1, 1

    with torch.device("meta"):
        # The KV cache asks for its device by name: 32 positions are enough, because it is never used.
        return model_class(parsed.model_copy(update={"max_length": 32}), NoTokens(), NoVae(), device="cpu")


def _write_vae(folder: Path, config: Mapping[str, Any], seed: int) -> int:
    import torch

    _model_class, config_class, vae_class = _classes(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = vae_class(config=config_class.model_validate(config).audio_vae_config).eval()
        latents = torch.randn(1, 64, 16)
    with torch.no_grad():
        last = [module for module in vae.decoder.modules() if isinstance(module, torch.nn.Conv1d)][-1]
        for _ in range(3):  # The scale passes through one tanh: three rounds come within a percent.
            loudness = torch.atanh(vae.decode(latents).clamp(-0.999, 0.999)).std().clamp_min(1e-6)
            scale: Any = last.weight_g
            scale.mul_(_LOUDNESS / loudness)
    torch.save({"state_dict": vae.state_dict()}, folder / "audiovae.pth")
    return sum(value.numel() for value in vae.state_dict().values())


def _write_weights(folder: Path, config: Mapping[str, Any], dtype: str, seed: int, stop: str) -> int:
    """Write model.safetensors tensor by tensor: a full model need not fit in memory."""
    import torch

    model_class, config_class, _vae_class = _classes(config)
    shapes = {
        name: tuple(value.shape)
        for name, value in _skeleton(model_class, config_class.model_validate(config)).state_dict().items()
    }
    generator = torch.Generator().manual_seed(seed + 1)
    kind = getattr(torch, dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + _ELEMENT_BYTES[dtype] * torch.Size(shape).numel()
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name, shape in shapes.items():
            tensor = _random_tensor(name, shape, kind, generator, stop)
            file.write(memoryview(tensor.view(torch.uint8).numpy().reshape(-1)))
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def _random_tensor(name: str, shape: tuple[int, ...], kind: Any, generator: Any, stop: str) -> Any:
    """One tensor, initialized as torch's own layers are: uniform within 1/sqrt(inputs), norms 1.

    The stop head depends only on feature 0, which is a constant: it always stops if row 1 is above row 0, else never.
    """
    import torch

    if name.endswith(("norm.weight", "layernorm.weight")):
        return torch.ones(shape, dtype=kind)
    if name == "stop_head.weight":
        tensor = torch.zeros(shape, dtype=kind)
        tensor[1 if stop == "always" else 0, 0] = 1.0
        return tensor
    wide = "embed_tokens" in name or "special_token" in name
    limit = 3**0.5 if wide else shape[-1] ** -0.5
    tensor = torch.empty(shape, dtype=kind).uniform_(-limit, limit, generator=generator)
    if name == "stop_proj.weight":
        tensor[0].zero_()
    if name == "stop_proj.bias":
        tensor[0] = 10.0  # silu(10) is 10 to four digits
    return tensor


def _write_stop_head(folder: Path, hidden: int, steps: int, seed: int) -> None:
    """Write the stop head, of 200 random ones, that ends trial sentences nearest to `steps` steps."""
    import torch
    from safetensors.torch import load_file, save_file

    runs = _trial_features(folder, 3 * steps, seed)
    generator = torch.Generator().manual_seed(seed + 2)
    best: tuple[float, Any, float] | None = None
    for _ in range(200):
        weights = torch.randn(hidden, generator=generator)
        weights[0] = 0.0
        scores = [run @ weights for run in runs]
        threshold = torch.quantile(torch.cat(scores), 1 - 1 / steps).item()
        ends = [next((i for i, s in enumerate(run.tolist()) if i > 2 and s > threshold), 9 * steps) for run in scores]
        cost = float(sum(abs(end - steps) for end in ends))
        if best is None or cost < best[0]:
            best = cost, weights, threshold
    assert best is not None
    path = folder / "model.safetensors"
    tensors = load_file(path)
    head = torch.zeros_like(tensors["stop_head.weight"], dtype=torch.float32)
    head[1] = best[1]
    head[1, 0] = -best[2] / torch.nn.functional.silu(torch.tensor(10.0)).item()
    tensors["stop_head.weight"] = head.to(tensors["stop_head.weight"].dtype)
    save_file(tensors, path, metadata={"format": "pt"})


def _trial_features(folder: Path, steps: int, seed: int) -> list[Any]:
    """The inputs of the stop head in trial runs: tensors of shape (steps, hidden)."""
    import torch
    from voxcpm import VoxCPM

    model = VoxCPM.from_pretrained(str(folder), load_denoiser=False, optimize=False, device="cpu").tts_model
    # Only latents are needed, so no audio is decoded.
    model.audio_vae.decode = lambda latents, *_: latents.new_zeros(1, 1, 1)
    seen: list[Any] = []
    model.stop_head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0][0].float()))
    runs = []
    with torch.random.fork_rng(devices=[]):
        for i, text in enumerate(("The quick brown fox jumps over the lazy dog.", "Hello there!", "Trial number 3.")):
            torch.manual_seed(seed + i)
            seen.clear()
            model.generate(target_text=text, max_len=steps, inference_timesteps=4, retry_badcase_ratio_threshold=99.0)
            runs.append(torch.stack(seen))
    return runs


# -- command line ------------------------------------------------------------------------------------------------


def _stop(text: str) -> Stop:
    if text == "never":
        return "never"
    return "always" if text == "always" else int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Write one checkpoint, and print its size."""
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.voxcpm_checkpoint.checkpoint", description=description
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument("--arch", choices=get_args(Arch), default="voxcpm2")
    parser.add_argument("--size", choices=get_args(Size), default="tiny")
    parser.add_argument("--stop", type=_stop, default="never", help="never, always, or about how many steps (tiny)")
    parser.add_argument("--dtype", choices=tuple(_ELEMENT_BYTES), default=None, help="default: depends on the size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--context", type=int, default=None, help="length of the KV cache")
    args = parser.parse_args(argv)
    began = time.monotonic()
    try:
        made = write_checkpoint(
            args.out,
            args.arch,
            stop=args.stop,
            size=args.size,
            dtype=args.dtype,
            seed=args.seed,
            context=args.context,
        )
    except ValueError as fault:
        parser.error(str(fault))
    millions = f"{made.parameters / 1e6:,.1f} M parameters and {made.vae_parameters / 1e6:,.1f} M in the VAE"
    print(f"{args.arch} {args.size}: {millions}, {made.size_bytes / 1e6:,.1f} MB, {time.monotonic() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
