"""Engine `musetalk` on a repository of upstream's signatures (`musetalk_stand_in.py`); upstream is on no registry."""

import importlib
import json
import math
import pickle
import re
import shutil
import sys
from array import array
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import attrs
import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gpuworker.engines.base import Chunk, EngineError, EngineInput, FormatChunk, LiveInput, OptionError, VideoChunk
from gpuworker.engines.catalog import parse_options
from gpuworker.engines.face.engine import PARAMS
from gpuworker.engines.musetalk.engine import MuseTalkEngine
from gpuworker.slots.run_engine import RunResult, run_engine
from protocol.wire.ivf import PTS_HZ
from protocol.wire.params_schema import check_schema
from protocol.wire.structs import VideoFormat
from protocol.wire.validators import Value

DOCS = Path(__file__).parents[3] / "docs"
STAND_IN = Path(__file__).with_name("musetalk_stand_in.py")
RATE = 16_000
WIDTH, HEIGHT, BOX = 320, 200, (100, 60, 180, 140)
#: The avatar's pictures are as grey as this.
GREYS = (60, 90, 120, 120, 90, 60)
Picture = NDArray[np.uint8]


def png(picture: Picture) -> bytes:
    codec: Any = av.CodecContext.create("png", "w")
    codec.height, codec.width = picture.shape[:2]
    codec.pix_fmt, codec.time_base = "rgb24", Fraction(1)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    return b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)])


def a_picture(grey: int) -> bytes:
    return png(np.full((HEIGHT, WIDTH, 3), grey, np.uint8))


@attrs.frozen
class Upstream:
    """The stand-in as a repository, with an avatar `ann`."""

    repo: Path
    calls: Path

    def called(self, what: str) -> list[dict[str, Any]]:
        told = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [call for call in map(json.loads, told) if call["what"] == what]

    @property
    def avatar(self) -> Path:
        return self.repo / "results/v15/avatars/ann"

    def made(self, *options: str) -> MuseTalkEngine:
        shown = [] if any(each.startswith(("image", "avatar")) for each in options) else ["avatar=ann"]
        engine = MuseTalkEngine(
            parse_options(MuseTalkEngine.OPTIONS, [f"repo={self.repo}", "size=100", "device=cpu", *shown, *options])
        )
        engine.load()
        return engine


@pytest.fixture
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Upstream:
    repo = tmp_path / "MuseTalk"
    utils = repo / "musetalk" / "utils"
    utils.mkdir(parents=True)
    names = ("utils", "audio_processor", "preprocessing", "blending", "face_parsing")
    for name in names:
        (utils / f"{name}.py").write_text("from musetalk.stand_in import *\n")
    shutil.copy(STAND_IN, repo / "musetalk" / "stand_in.py")
    for package in (repo / "musetalk", utils):
        (package / "__init__.py").touch()
    for folder in ("musetalkV15", "whisper", "sd-vae", "dwpose", "face-parse-bisent"):
        (repo / "models" / folder).mkdir(parents=True)
    for file in ("musetalkV15/unet.pth", "musetalkV15/musetalk.json", "dwpose/dw-ll_ucoco_384.pth"):
        (repo / "models" / file).write_text("weights")
    (repo / "models/face-parse-bisent/79999_iter.pth").write_text("weights")
    found = Upstream(repo, tmp_path / "calls")
    mask = np.zeros((BOX[3] - BOX[1], BOX[2] - BOX[0], 3), np.uint8)
    mask[len(mask) // 2 :] = 255
    for folder, pictures in (("full_imgs", map(a_picture, GREYS)), ("mask", [png(mask)] * len(GREYS))):
        (found.avatar / folder).mkdir(parents=True)
        for number, data in enumerate(pictures):
            (found.avatar / folder / f"{number:08d}.png").write_bytes(data)
    (found.avatar / "coords.pkl").write_bytes(pickle.dumps([[np.int32(at) for at in BOX]] * len(GREYS)))
    (found.avatar / "mask_coords.pkl").write_bytes(pickle.dumps([list(BOX)] * len(GREYS)))
    torch.save([torch.zeros(1, 8, 32, 32)] * len(GREYS), found.avatar / "latents.pt")
    monkeypatch.setenv("STAND_IN_CALLS", str(found.calls))
    monkeypatch.setattr(sys, "path", [*sys.path, str(repo)])
    for name in ("musetalk", "musetalk.utils", "musetalk.stand_in", *(f"musetalk.utils.{name}" for name in names)):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", importlib.import_module("musetalk.stand_in"))
    return found


def loud(*parts: tuple[float, float], rate: int = RATE) -> bytes:
    """Sound of (loudness, seconds), one after another."""
    samples = array("h")
    for level, seconds in parts:
        tone = (math.sin(math.tau * 500 * at / rate) for at in range(round(seconds * rate)))
        samples.extend(round(32_767 * level * each) for each in tone)
    return samples.tobytes()


def run(
    engine: MuseTalkEngine, given: EngineInput | LiveInput | None = None, **params: Value
) -> tuple[RunResult, list[Chunk]]:
    chunks: list[Chunk] = []
    inputs: dict[str, Any] = {} if given is None else {"audio": given}
    return run_engine(engine, params, inputs, lambda: False, chunks.append), chunks


def said(pcm: bytes, rate: int = RATE) -> EngineInput:
    return EngineInput(pcm, f"audio/L16;rate={rate};channels=1")


def pictures_in(chunks: list[Chunk]) -> list[VideoChunk]:
    return [chunk for chunk in chunks if isinstance(chunk, VideoChunk)]


def seen(chunks: list[Chunk]) -> list[Picture]:
    codec: Any = av.CodecContext.create("vp8", "r")
    shown = [frame for chunk in pictures_in(chunks) for frame in codec.decode(av.Packet(chunk.data))]
    return [np.asarray(frame.to_ndarray(format="rgb24"), np.uint8) for frame in shown]


def brightness(picture: Picture) -> tuple[int, int]:
    """Of the lower half of the face, and of a corner; shown is the square from x = 40 on, at half its size."""
    return round(float(picture[55:65, 40:60].mean())), round(float(picture[:20, :20].mean()))


# -- video ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "fps"), [(16_000, 25), (24_000, 25), (44_100, 25), (16_000, 20), (22_050, 30)])
def test_each_picture_shows_the_face_that_belongs_to_its_sound(upstream: Upstream, rate: int, fps: int) -> None:
    engine = upstream.made(f"fps={fps}", "bitrate=4000000")
    end, chunks = run(engine, said(loud((0.1, 1.0), (0.7, 2.0), (0.3, 0.6), rate=rate), rate))
    assert end.outcome == "completed"
    assert chunks[0] == FormatChunk(None, VideoFormat(width=100, height=100, fps=fps))
    made = pictures_in(chunks)
    assert [each.pts for each in made] == [PTS_HZ * number // fps for number in range(round(3.6 * fps))]
    assert made[0].key
    shown = [brightness(picture) for picture in seen(chunks)]
    for level, begin, end_s in ((0.1, 0, 1), (0.7, 1, 3), (0.3, 3, 3.6)):
        # A feature is 20 ms, which pictures of another length do not begin with; soxr blurs a step a little.
        inner = shown[round(begin * fps) + 1 : round(end_s * fps) - 1]
        assert all(abs(face - 255 * level) < 12 for face, _ in inner), (level, inner)
    assert [corner for _, corner in shown[:6]] == pytest.approx(GREYS, abs=8)


def test_it_is_the_same_video_however_its_sound_comes_and_comes_while_it_does(upstream: Upstream) -> None:
    engine = upstream.made()
    speech = loud((0.2, 0.5), (0.6, 2.2), (0.0, 0.33))
    _, whole = run(engine, said(speech))
    assert len(pictures_in(whole)) == 76
    live = LiveInput(f"audio/L16;rate={RATE};channels=1")
    for start in range(0, len(speech), 777):
        live.feed(speech[start : start + 777])
    live.feed(b"", last=True)
    assert run(engine, live)[1] == whole
    live = LiveInput(f"audio/L16;rate={RATE};channels=1")
    chunks = engine.generate({}, {"audio": live})
    for seconds in (0.24, 0.16, 0.16):  # four pictures, and the two after them that the model hears
        live.feed(loud((0.3, seconds)))
        assert [isinstance(next(chunks), VideoChunk) for _ in range(4)] == [True] * 4
    chunks.close()  # type: ignore[attr-defined]  # a generator
    assert pictures_in(run(engine, said(b""))[1]) == []


def test_the_idle_loop_is_the_avatars_own_and_speech_goes_on_from_any_of_its_pictures(upstream: Upstream) -> None:
    engine = upstream.made("bitrate=4000000")
    end, chunks = run(engine, idle=True)
    assert end.outcome == "completed"
    loop = seen(chunks)
    assert len(loop) == 30  # five times its six pictures: a second, and a whole cycle
    assert [brightness(each)[1] for each in loop] == pytest.approx(GREYS * 5, abs=8)
    assert [brightness(each)[0] for each in loop] == pytest.approx(GREYS * 5, abs=8)
    _, chunks = run(engine, said(loud((0.5, 0.2))), start_frame=32, avatar="bob")
    shown = [brightness(each) for each in seen(chunks)]
    assert [corner for _, corner in shown] == pytest.approx([120, 120, 90, 60, 60], abs=8)
    assert [face for face, _ in shown] == pytest.approx([128] * 5, abs=8)


def test_a_picture_is_made_an_avatar_with_upstreams_detectors(upstream: Upstream) -> None:
    (upstream.repo.parent / "me.png").write_bytes(a_picture(90))
    engine = upstream.made("image=me.png", "bitrate=4000000")
    here = str(upstream.repo)
    [material] = upstream.called("material")
    assert material == {"what": "material", "cwd": here, "box": [100, 60, 180, 150], "mode": "jaw"}
    assert [call["cheeks"] for call in upstream.called("parsing")] == [[90, 90]]
    assert [call["shape"] for call in upstream.called("latents")] == [[256, 256, 3]]
    assert [call["cwd"] for call in upstream.called("load")] == [here]
    assert Path.cwd() == upstream.repo.parent
    face, corner = brightness(seen(run(engine, said(loud((0.6, 0.2))))[1])[-1])
    assert [face, corner] == pytest.approx([153, 90], abs=8)
    assert len(pictures_in(run(engine, idle=True)[1])) == 25


def test_a_full_gpu_is_a_fault_that_is_tried_again(upstream: Upstream) -> None:
    engine = upstream.made()
    end, _ = run(engine, said(loud((0.95, 0.5))))
    assert (end.code, end.retryable, end.restart) == ("engine_failed", True, True)


# -- what is refused -----------------------------------------------------------------------------------------------


def lose(name: str) -> Callable[[Upstream], None]:
    return lambda upstream: shutil.rmtree(path) if (path := upstream.repo / name).is_dir() else path.unlink()


def spoil(name: str, data: bytes) -> Callable[[Upstream], object]:
    return lambda upstream: (upstream.repo / name).write_bytes(data)


ANN = "results/v15/avatars/ann"


@pytest.mark.parametrize(
    ("options", "before", "words"),
    [
        (["repo=nowhere"], None, "git clone https://github.com/TMElyralab/MuseTalk"),
        ([], lose("models/musetalkV15/unet.pth"), "lacks models/musetalkV15/unet.pth: cd .*sh download_weights.sh"),
        ([], lose("models/whisper"), "lacks models/whisper: "),
        (["image=me.png"], lose("models/dwpose"), "lacks models/dwpose/dw-ll_ucoco_384.pth: "),
        ([], spoil("models/musetalkV15/unet.pth", b"broken"), "loading state_dict"),
        ([], spoil("musetalk/utils/utils.py", b"import diffusers_of_upstream"), "requirements.txt"),
        (["avatar=bob"], None, "No such file or directory; prepare it with upstream's scripts.realtime_inference"),
        ([], spoil(f"{ANN}/coords.pkl", b"none"), "cannot be read: .*; prepare it"),
        ([], spoil(f"{ANN}/coords.pkl", pickle.dumps([BOX] * 5)), "not complete, or a picture of it shows no face"),
        ([], spoil(f"{ANN}/coords.pkl", pickle.dumps([(0.0,) * 4] * 6)), "shows no face"),
        ([], lose(f"{ANN}/mask/00000003.png"), "not complete"),
        (["image=nowhere.png"], None, "cannot be read: .*; give a PNG or JPEG"),
        (["image=calls"], None, "cannot be read: .*; give a PNG or JPEG"),
        (["image=black.png"], None, "shows no whole face"),
    ],
)
def test_what_cannot_be_loaded_says_what_to_do(
    upstream: Upstream, options: list[str], before: Callable[[Upstream], object] | None, words: str
) -> None:
    (upstream.repo.parent / "black.png").write_bytes(a_picture(0))
    (upstream.repo.parent / "me.png").write_bytes(a_picture(90))
    upstream.calls.write_text("no picture at all\n" if options == ["image=calls"] else "")
    if before is not None:
        before(upstream)
    with pytest.raises(EngineError, match=words):
        upstream.made(*options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["fps=60"], "10..30"),
        (["batch=11"], "1..10"),
        (["size=101"], "even; write 102"),
        (["avatar=ann", "image=me.png"], "give either"),
        (["avatar="], "give either"),
    ],
)
def test_an_option_that_cannot_be_used_says_why(upstream: Upstream, options: list[str], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        upstream.made(*options)


def test_its_params_are_those_of_engine_face_and_a_request_without_speech_is_refused(upstream: Upstream) -> None:
    engine = upstream.made()
    schema = engine.capabilities.params
    check_schema(schema)
    assert schema["properties"].keys() == PARAMS["properties"].keys()
    for name, rule in PARAMS["properties"].items():
        assert schema["properties"][name] | {"description": ""} == rule | {"description": ""}
    assert not engine.capabilities.reproducible  # it was never seen to be, on the real one
    end, _ = run(engine)
    assert (end.code, list(end.details)) == ("input_missing", ["audio"])
    assert run(engine, EngineInput(b"abc", "audio/L16"))[0].code == "input_mismatch"
    assert run(engine, said(loud((0.3, 0.1))))[0].outcome == "completed"


def test_the_documents_table_is_the_engines_options() -> None:
    _, _, part = (DOCS / "faces.md").read_text().partition("## musetalk\n")
    told = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", part, re.MULTILINE))
    defaults = {name: option.default for name, option in MuseTalkEngine.OPTIONS.items()}
    assert told == {name: "none" if default is None else f"`{default}`" for name, default in defaults.items()}
