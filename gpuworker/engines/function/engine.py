"""Engine `function`: any Python callable as an engine, `-o call=module:callable`.

What it returns, or each item that it yields, becomes output:

| value | becomes |
| --- | --- |
| (sample_rate, array), as Gradio has it | audio at that rate |
| numpy array or torch tensor: float -1..1, int16 or int32; mono, (n, 2) or (2, n) | audio at option `sample_rate` |
| bytes | audio if option `sample_rate` is given (16-bit, little-endian), else binary output: an image, a video … by |
| | its first bytes |
| an image of PIL, or an object with `data` and `media_type` | output of that media type |
| str, dict, list, number, bool | output; scalars and arrays of numpy or torch in them become numbers and lists |
| a chunk of `gpuworker.engines.base` | itself |
| None | nothing |

Its parameters become the params: the JSON Schema is derived from annotations and defaults. A parameter
annotated `bytes` or `EngineInput` is an uploaded input of that name, and `Annotated[bytes, "image/png", "image/*"]`
says which media types it takes. One annotated `LiveInput` may be sent while the call runs: it gets an iterator over its
bytes, or with `.text()` over its text, that waits for more. One called `cancelled` gets a callable that
returns whether to stop, and one called `context`, if it is annotated as nothing else, gets the `RequestContext`:
who asked, and the request's id. A class is instantiated once, at load, and the instance is called: the place for a
model.

A call may take as long as the space's `run_timeout_s` (120), and be silent meanwhile.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from gpuworker.engines.base import (
    MAX_FINGERPRINT_CHARS,
    Capabilities,
    Chunk,
    Engine,
    EngineError,
    FormatChunk,
    Option,
    OptionError,
    OptionValue,
    RequestContext,
)
from gpuworker.engines.function.results import Results
from gpuworker.engines.function.signature import Signature, read_signature
from protocol.wire.structs import AudioFormat
from protocol.wire.validators import Value


class FunctionEngine(Engine):
    """Calls one Python callable; see the module's docstring.

    Args:
        options: values for `OPTIONS`.
        call: the callable itself, instead of option `call`.
        params: JSON Schema of its params, instead of the one derived from its signature.
    """

    SUMMARY: ClassVar[str] = "any Python callable, plain or generator: -o call=module:callable"
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "call": Option(required=True, help="module:callable; also searched in the working directory"),
        "sample_rate": Option(kind=int, help="sample rate of its audio, Hz; bytes are then audio"),
        "channels": Option(kind=int, default=1, help="channels of its audio, 1 or 2; needs sample_rate"),
        "reproducible": Option(kind=bool, default=False, help="the same params always make the same output"),
    }

    def __init__(
        self,
        options: Mapping[str, OptionValue] | None = None,
        call: Callable[..., Any] | None = None,
        params: Mapping[str, Value] | None = None,
    ) -> None:
        super().__init__(options)
        self._call = call
        self._params = params
        self._signature: Signature | None = None
        self._format: AudioFormat | None = None
        if self.options["sample_rate"] is not None:
            try:
                self._format = AudioFormat(
                    sample_rate=int(self.options["sample_rate"]), channels=int(self.options["channels"] or 0)
                )
            except ValueError as fault:
                raise OptionError(f"-o {fault}") from None

    @property
    def capabilities(self) -> Capabilities:
        """Its parameters as params and inputs; the format is known in advance only with option `sample_rate`."""
        assert self._signature is not None
        return Capabilities(
            format=self._format,
            late_format=self._format is None,
            reproducible=bool(self.options["reproducible"]),
            fingerprint=str(self.options.get("call") or "")[:MAX_FINGERPRINT_CHARS],
            params=self._signature.params if self._params is None else dict(self._params),
            inputs=self._signature.inputs,
        )

    def load(self) -> None:
        """Import the callable; if it is a class, make the instance.

        Raises:
            EngineError: it cannot be imported, instantiated or served.
        """
        found = self._call if self._call is not None else _find(str(self.options["call"]))
        if isinstance(found, type):
            found = found()
        if not callable(found):
            raise EngineError(f"{self.options['call']}: {type(found).__name__} is not callable")
        self._call = found
        self._signature = read_signature(found)

    def generate(
        self, params: dict[str, Value], inputs: Mapping[str, Any], context: RequestContext | None = None
    ) -> Iterator[Chunk]:
        """Call it, and convert its results to chunks."""
        assert self._call is not None
        assert self._signature is not None
        results = Results(self._format)
        arguments = self._signature.arguments(params, inputs, self.cancelled, context or RequestContext())
        returned = self._call(**arguments)
        if not isinstance(returned, Iterator):
            yield from results.chunks(returned)
        else:
            try:
                for item in returned:
                    yield from results.chunks(item)
            finally:
                if inspect.isgenerator(returned):
                    returned.close()
        if not results.has_format:
            yield FormatChunk(None)


def _find(path: str) -> Any:
    module_name, colon, name = path.partition(":")
    if not colon or not name or not module_name:
        raise EngineError(f"-o call={path}: write it as module:callable")
    # A console script does not search the directory it is started in, unlike `python -m`.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as fault:
        raise EngineError(f"-o call={path}: {fault}") from fault
    return found
