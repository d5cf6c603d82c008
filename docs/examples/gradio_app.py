"""A Gradio app whose model is served through a relay as well, from the same process.

    pip install . gradio                       # in a checkout of relayd
    RELAY_URL=ws://127.0.0.1:8787 RELAY_TOKEN=rly_w_... python docs/examples/gradio_app.py
    relay submit --space tts --param text="Hello" --param speed=0.5 -o out.wav

The page and the relay call one function on one model. IndexTTS2's own WebUI is served the same way: hand `serve` a
function that calls its `tts.infer(...)`.
"""

import os
import threading
from collections.abc import Callable, Iterator

import gradio as gr
import numpy as np

from gpuworker.embed import EmbedError, serve

SAMPLE_RATE = 24_000


class Model:
    """Stands for a model on the GPU: slow to load, and good for one call at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def speak(self, text: str, speed: float) -> Iterator[np.ndarray]:
        """A tone a letter, a quarter of a second each at speed 1."""
        for letter in text:
            when = np.arange(int(SAMPLE_RATE / 4 / speed)) / SAMPLE_RATE
            fade = np.minimum(1, np.minimum(when, when[::-1]) * 100)
            yield (0.2 * fade * np.sin(2 * np.pi * (200 + 8 * (ord(letter) % 64)) * when)).astype(np.float32)


model = Model()


def speak_for_page(text: str, speed: float) -> tuple[int, np.ndarray]:
    """What the page's button calls."""
    with model.lock:
        return SAMPLE_RATE, np.concatenate(list(model.speak(text, speed)))


def speak_for_relay(text: str, speed: float = 1.0, *, cancelled: Callable[[], bool]) -> Iterator[np.ndarray]:
    """What the relay's requests call: the same model, streamed while it is made.

    Its parameters are the request's params; `cancelled` is asked for by its name.
    """
    with model.lock:  # the page may be using the model
        for piece in model.speak(text, speed):
            if cancelled():
                return
            yield piece


PARAMS = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "minLength": 1, "maxLength": 500},
        "speed": {"type": "number", "minimum": 0.25, "maximum": 4, "default": 1.0},
    },
    "required": ["text"],
    "additionalProperties": False,
}

with gr.Blocks(title="A voice") as page:
    text = gr.Textbox("Hello", label="Text")
    speed = gr.Slider(0.25, 4, 1, label="Speed")
    audio = gr.Audio(label="Speech")
    gr.Button("Speak").click(speak_for_page, [text, speed], audio, api_name="speak")
    standing = gr.Textbox(label="Relay", interactive=False)

if __name__ == "__main__":
    try:
        handle = serve(speak_for_relay, space="tts", sample_rate=SAMPLE_RATE, params=PARAMS, name="gradio")
    except EmbedError as fault:
        raise SystemExit(f"not served through the relay: {fault}") from None

    def relay_standing() -> str:
        """For the page: how the worker stands."""
        status = handle.status()
        done = f"{status.completed} done, {status.failed} failed, {status.cancelled} cancelled"
        return f"{status.state} at {status.relay}: {status.running} running, {done} {status.fault}"

    with page:
        gr.Timer(1.0).tick(relay_standing, None, standing, api_name="standing")
    page.launch(server_name="127.0.0.1", server_port=int(os.environ.get("PORT", "7860")))
    handle.stop()
