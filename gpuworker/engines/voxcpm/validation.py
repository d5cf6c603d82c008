"""Checks the rules for params and inputs that JSON Schema cannot express."""

from collections.abc import Collection, Mapping

from protocol.speakable import speakable
from protocol.wire.validators import Value


def find_faults(params: Mapping[str, Value], inputs: Collection[str]) -> dict[str, str]:
    """Find the faults of a request that satisfies the schema.

    Args:
        params: its params; None counts as absent.
        inputs: names of its inputs.

    Returns:
        field -> what is wrong with it, phrased to follow the field's name.
    """
    there = {name for name, value in params.items() if value is not None} | set(inputs)
    prompts = [name for name in ("prompt_wav", "prompt_wav_url") if name in there]
    references = [name for name in ("reference_wav", "reference_wav_url") if name in there]
    faults: dict[str, str] = {}
    if not speakable(params["text"], symbols=False):
        faults["text"] = "contains nothing to speak"
    for name in ("prompt_text", "voice_description"):
        if name in there and not speakable(params[name], symbols=False):
            faults[name] = "contains no words"
    for names in (prompts, references):
        if len(names) > 1:
            faults[names[1]] = f"was given with input {names[0]}; send only one of them"
    if prompts and "prompt_text" not in there:
        faults["prompt_text"] = f"is required with {prompts[0]}: its transcript, word for word"
    if "prompt_text" in there and not prompts:
        faults["prompt_wav"] = "is required with prompt_text, as an input: the audio that prompt_text transcribes"
    if "prompt_text" in there and "voice_description" in there:
        faults["voice_description"] = "has no effect if speech continues from a prompt; leave out one of them"
    others = [*prompts, *(["prompt_text"] if "prompt_text" in there else []), *references]
    if "voice" in there and others:
        faults["voice"] = f"already contains a prompt; leave out {' and '.join(others)}, or leave out voice"
    return faults
