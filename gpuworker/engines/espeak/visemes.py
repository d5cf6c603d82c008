"""Says how the mouth stands at a phoneme that is written in IPA.

The visemes are the fifteen that avatars commonly have as blend shapes, by their usual names. A phoneme is found by its
letters, as IPA names them by what tongue and lips do, so that this holds in every language of espeak-ng.
"""

from protocol.wire.validators import Value

#: Name -> opening (0 closed, 1 wide open) and width (0 rounded, 0.5 at rest, 1 spread) of the mouth.
VISEMES: dict[str, tuple[float, float]] = {
    "sil": (0.0, 0.5),
    "PP": (0.0, 0.5),
    "FF": (0.1, 0.6),
    "TH": (0.2, 0.6),
    "DD": (0.25, 0.6),
    "kk": (0.3, 0.5),
    "CH": (0.25, 0.15),
    "SS": (0.12, 0.75),
    "nn": (0.2, 0.55),
    "RR": (0.3, 0.3),
    "aa": (0.95, 0.55),
    "E": (0.55, 0.8),
    "I": (0.3, 1.0),
    "O": (0.6, 0.15),
    "U": (0.3, 0.0),
}
_VOWELS = {"aa": "aäɑæɐʌɶ", "E": "eɛəɜɘɞɚɝ", "I": "iɪɨ", "O": "oɔɒɤøœɵ", "U": "uʊyʏʉɯ"}
_CONSONANTS = {
    "PP": "pbmɓʙ",
    "FF": "fvʋɱɸβ",
    "TH": "θð",
    "DD": "tdlɫɾʈɖɗɭʎɬɮ",
    "kk": "kɡgcɟqɢxɣχħʕhɦʔɰɠ",
    "CH": "ʃʒɕʑʂʐçʝʧʤ",
    "SS": "szʦʣ",
    "nn": "nɲŋɳɴ",
    "RR": "rɹɻɽʀʁ",
    "I": "j",
    "U": "wʍɥ",
}
_OF_VOWEL = {letter: viseme for viseme, letters in _VOWELS.items() for letter in letters}
_OF_CONSONANT = {letter: viseme for viseme, letters in _CONSONANTS.items() for letter in letters}


def viseme_of(phoneme: str) -> str | None:
    """The viseme of a phoneme: `sil` of an empty one, which is a pause, and None where its letters say nothing."""
    if not phoneme:
        return "sil"
    # Of a diphthong its longer first part is seen, of an affricate (ts, tʃ) how it is let go.
    if vowel := next((_OF_VOWEL[letter] for letter in phoneme if letter in _OF_VOWEL), None):
        return vowel
    return next((_OF_CONSONANT[letter] for letter in reversed(phoneme) if letter in _OF_CONSONANT), None)


def shapes(phonemes: list[tuple[int, str]], begin: int, sample_rate: int) -> list[Value]:
    """Visemes for a listener: `t`, seconds from the beginning of the speech, `viseme`, `opening` and `width`.

    Args:
        phonemes: each with the sample of the text's speech at which it begins.
        begin: sample of the speech at which that of the text begins.
        sample_rate: Hz.
    """
    made: list[Value] = []
    last = None
    for sample, phoneme in phonemes:
        viseme = viseme_of(phoneme)
        if viseme is not None and viseme != last:
            last, (opening, width) = viseme, VISEMES[viseme]
            at = round((begin + sample) / sample_rate, 3)
            made.append({"t": at, "viseme": viseme, "opening": opening, "width": width})
    return made
