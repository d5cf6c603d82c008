"""Checks the rules for params and inputs that JSON Schema cannot express."""

from collections.abc import Collection, Mapping

from protocol.wire.validators import Value


def speakable(text: str) -> bool:
    """Whether the text contains a letter or a digit, of any script."""
    return any(char.isalnum() for char in text)


def find_faults(given: Mapping[str, Value], inputs: Collection[str]) -> dict[str, str]:
    """What is wrong with a request that keeps the schema.

    Args:
        given: its params; None is not given.
        inputs: names of its inputs.

    Returns:
        field -> what is wrong with it, to be read after the field's name.
    """
    there = {name for name, value in given.items() if value is not None} | set(inputs)
    prompts = [name for name in ("prompt_wav", "prompt_wav_url") if name in there]
    references = [name for name in ("reference_wav", "reference_wav_url") if name in there]
    faults: dict[str, str] = {}
    if not speakable(given["text"]):
        faults["text"] = "contains nothing to speak"
    for name in ("prompt_text", "voice_description"):
        if name in there and not speakable(given[name]):
            faults[name] = "contains no words"
    for names in (prompts, references):
        if len(names) > 1:
            faults[names[1]] = f"is given beside input {names[0]}; send one of them"
    if prompts and "prompt_text" not in there:
        faults["prompt_text"] = f"is required with {prompts[0]}: what is said in it, word for word"
    if "prompt_text" in there and not prompts:
        faults["prompt_wav"] = "is required with prompt_text, as an input: the audio it is the text of"
    if "prompt_text" in there and "voice_description" in there:
        faults["voice_description"] = "is not followed where speech goes on from a prompt; leave out one of them"
    others = [*prompts, *(["prompt_text"] if "prompt_text" in there else []), *references]
    if "voice" in there and others:
        faults["voice"] = f"is a prompt of its own; leave out {' and '.join(others)}, or leave out voice"
    return faults
