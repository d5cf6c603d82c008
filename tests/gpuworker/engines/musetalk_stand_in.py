"""Stands for MuseTalk's repository in tests: the functions and classes of version 1.5 that the engine uses, no model.

Copied into a folder as each of the modules of `musetalk.utils` and as `transformers`, never imported from here. What it
hears of 20 ms is how loud they are; the face that it makes of a picture is as bright as these 40 ms are loud.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import torch

HZ, FEATURES, WIDTH = 16_000, 1_500, 384
#: The face of every picture.
BOX = (100, 60, 180, 140)


def _note(what: str, **more: Any) -> None:
    with Path(os.environ["STAND_IN_CALLS"]).open("a") as file:
        file.write(json.dumps({"what": what, "cwd": str(Path.cwd()), **more}) + "\n")


# -- musetalk.utils.utils ----------------------------------------------------------------------------------------


class Vae:
    def __init__(self) -> None:
        self.vae = torch.nn.Linear(1, 1)

    def get_latents_for_unet(self, img: "np.ndarray[Any, np.dtype[np.uint8]]") -> torch.Tensor:
        _note("latents", shape=img.shape)
        return torch.zeros(1, 8, 32, 32)

    def decode_latents(self, latents: torch.Tensor) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        bright = 255 * latents.mean(dim=(1, 2, 3)).clamp(0, 1)
        return np.stack([np.full((256, 256, 3), round(float(each)), np.uint8) for each in bright])


class Denoiser(torch.nn.Linear):
    def __init__(self) -> None:
        super().__init__(1, 1)

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, *, encoder_hidden_states: torch.Tensor) -> Any:  # type: ignore[override]
        assert latents.shape[1:] == (8, 32, 32)
        assert timesteps.tolist() == [0]
        assert encoder_hidden_states.shape == (len(latents), 50, WIDTH)
        assert not torch.is_grad_enabled()
        if encoder_hidden_states.max() > 0.9:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        loud = encoder_hidden_states.reshape(len(latents), 10, 5, WIDTH)[:, 4:6].mean(dim=(1, 2, 3))
        return SimpleNamespace(sample=loud[:, None, None, None].expand(-1, 4, 32, 32))


def load_all_model(
    unet_model_path: str = "models/musetalkV15/unet.pth",
    vae_type: str = "sd-vae",
    unet_config: str = "models/musetalkV15/musetalk.json",
    device: Any = None,
) -> tuple[Vae, SimpleNamespace, torch.nn.Module]:
    _note("load", unet=unet_model_path, vae=vae_type, config=unet_config, device=str(device))
    if Path(unet_model_path).read_text() == "broken":
        raise RuntimeError("Error(s) in loading state_dict for UNet2DConditionModel")
    return Vae(), SimpleNamespace(model=Denoiser(), device=device), torch.nn.Identity()


# -- musetalk.utils.audio_processor, transformers ----------------------------------------------------------------


class AudioProcessor:
    def __init__(self, feature_extractor_path: str = "openai/whisper-tiny/") -> None:
        assert Path(feature_extractor_path).is_dir()

    def feature_extractor(self, raw_speech: Any, *, return_tensors: str, sampling_rate: int) -> Any:
        assert (return_tensors, sampling_rate) == ("pt", HZ)
        step = HZ // 50
        padded = np.zeros(FEATURES * step, np.float32)
        padded[: len(raw_speech)] = raw_speech
        loud = np.abs(padded).reshape(FEATURES, step).max(axis=1)
        return SimpleNamespace(input_features=torch.from_numpy(loud)[None])

    def get_whisper_chunk(
        self,
        whisper_input_features: Sequence[torch.Tensor],
        device: Any,
        weight_dtype: Any,
        whisper: Any,
        librosa_length: int,
        fps: int = 25,
        audio_padding_length_left: int = 2,
        audio_padding_length_right: int = 2,
    ) -> torch.Tensor:
        """Ten features a picture, the first `floor(50 / fps) * 2` of which are before it; only of whole seconds."""
        layers = [whisper.encoder(one, output_hidden_states=True).hidden_states for one in whisper_input_features]
        heard = torch.cat([torch.stack(layer, dim=2) for layer in layers], dim=1).to(weight_dtype)
        seconds, lead = librosa_length // HZ, 50 // fps
        heard = heard[:, : seconds * 50]
        ends = [torch.zeros(1, lead * each, *heard.shape[2:]) for each in (2, 6)]
        heard = torch.cat([ends[0], heard, ends[1]], dim=1)
        begins = [int(at * 50 / fps) for at in range(seconds * fps)]
        return torch.cat([heard[:, begin : begin + 10] for begin in begins]).reshape(len(begins), 50, WIDTH)


class WhisperModel(torch.nn.Module):
    @classmethod
    def from_pretrained(cls, path: str) -> "WhisperModel":
        assert Path(path).is_dir()
        return cls()

    def encoder(self, features: torch.Tensor, *, output_hidden_states: bool) -> Any:
        assert output_hidden_states
        return SimpleNamespace(hidden_states=tuple(features[..., None].expand(-1, -1, WIDTH) for _ in range(5)))


# -- musetalk.utils.preprocessing, .face_parsing, .blending ------------------------------------------------------


def get_landmark_and_bbox(img_list: list[str], upperbondrange: int = 0) -> tuple[list[Any], list[Any]]:
    frames = []
    for path in img_list:
        with av.open(path) as file:
            frames.append(next(file.decode(video=0)).to_ndarray(format="bgr24"))
    return [BOX if frame.any() else (0.0, 0.0, 0.0, 0.0) for frame in frames], frames


class FaceParsing:
    def __init__(self, left_cheek_width: int = 80, right_cheek_width: int = 80) -> None:
        _note("parsing", cheeks=[left_cheek_width, right_cheek_width])


def get_image_prepare_material(
    image: Any, face_box: Any, upper_boundary_ratio: float = 0.5, expand: float = 1.5, fp: Any = None, mode: str = "raw"
) -> tuple[Any, list[int]]:
    assert isinstance(fp, FaceParsing)
    _note("material", box=[int(at) for at in face_box], mode=mode)
    left, top, right, bottom = face_box
    mask = np.zeros((bottom - top, right - left), np.uint8)
    mask[len(mask) // 2 :] = 255
    return mask, [left, top, right, bottom]


def get_image_blending(image: Any, face: Any, face_box: Any, mask_array: Any, crop_box: Any) -> Any:
    left, top, right, bottom = face_box
    mask = np.atleast_3d(mask_array)[:, :, :1] > 127
    image[top:bottom, left:right] = np.where(mask, face, image[top:bottom, left:right])
    return image[:, :, ::-1][:, :, ::-1]
