"""Checks the links of all documents, and that the Chinese documents are in step with the English ones."""

import re
from pathlib import Path

import attrs
import pytest

from relayd.config.schema import SECTIONS

ROOT = Path(__file__).parents[2]
FOLDERS = ("", "docs", "docs/decisions", "docs/zh", "deploy", "bench")
DOCUMENTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))
#: Each Chinese document, and the English one that it translates.
TRANSLATIONS = {ROOT / "README.zh.md": ROOT / "README.md"} | {
    path: ROOT / "docs" / path.name for path in sorted((ROOT / "docs/zh").glob("*.md"))
}
MAIN = {"README", "coming-from", "gpu-machine", "http", "openai", "operations", "page", "tui"}

_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`[^`]+`")
#: Where a list entry or a table row begins, which need no empty line before them.
_ENTRY = re.compile(r"^(?= *(?:- |[0-9]+\. |\|))", re.MULTILINE)
_KIND = re.compile(r" *(#+|-|[0-9]+\.|\|) ")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def prose(path: Path) -> str:
    """The text of a document without its code blocks."""
    return _FENCED.sub("", read(path))


def anchors(path: Path) -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    names: list[str] = []
    for _, heading in _HEADING.findall(prose(path)):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        names.append(f"{name}-{names.count(name)}" if name in names else name)
    return set(names)


def sections(path: Path) -> list[list[str]]:
    """For each heading, it and what stands under it: paragraphs, list entries and table rows."""
    found: list[list[str]] = [[]]
    for block in re.split(r"\n{2,}", _ENTRY.sub("\n", prose(path)).strip()):
        if block.startswith("#"):
            found.append([])
        found[-1].append(" ".join(block.split()))
    return found[1:]


def kind(block: str) -> str:
    """What a block begins with: `#`, `-`, `1.`, `|`, or nothing for a paragraph."""
    match = _KIND.match(block)
    return match[1] if match else ""


def facts(block: str) -> set[str]:
    """What is the same in every language: code, figures, and the files to which links lead."""
    files = {Path(link.partition("#")[0]).name.replace(".zh.", ".") for link in _LINK.findall(block)}
    return files | set(_CODE.findall(block)) | set(re.findall(r"[0-9]+", _LINK.sub("", _CODE.sub("", block))))


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_link_leads_to_a_file_and_a_heading_that_exist(document: Path) -> None:
    dead = []
    for link in _LINK.findall(_CODE.sub("", prose(document))):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (document.parent / file).resolve() if file else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_setting_and_metric_that_a_document_names_exists(document: Path) -> None:
    code = " ".join(_CODE.findall(prose(document)))
    settings = {f"{section}.{field.name}" for section, cls in SECTIONS.items() for field in attrs.fields(cls)}
    named_settings = set(re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_]+)`", code))
    assert named_settings - settings == set()
    metrics = set(re.findall(r"`(relayd_[a-z_]+)", prose(ROOT / "docs/metrics.md")))
    assert set(re.findall(r"`(relayd_[a-z_]+)", code)) - metrics == set()


def test_the_main_documents_are_in_chinese_too() -> None:
    assert {path.stem for path in TRANSLATIONS.values()} == MAIN


@pytest.mark.parametrize("chinese", TRANSLATIONS, ids=named)
def test_a_chinese_document_has_the_headings_of_the_english_one(chinese: Path) -> None:
    levels = [[len(marks) for marks, _ in _HEADING.findall(prose(path))] for path in (chinese, TRANSLATIONS[chinese])]
    assert levels[0] == levels[1]


@pytest.mark.parametrize("chinese", TRANSLATIONS, ids=named)
def test_a_chinese_document_has_the_code_blocks_of_the_english_one(chinese: Path) -> None:
    assert _FENCED.findall(read(chinese)) == _FENCED.findall(read(TRANSLATIONS[chinese]))


@pytest.mark.parametrize("chinese", TRANSLATIONS, ids=named)
def test_a_chinese_document_has_the_paragraphs_entries_and_rows_of_the_english_one(chinese: Path) -> None:
    english = TRANSLATIONS[chinese]
    for theirs, ours in zip(sections(english), sections(chinese), strict=True):
        kinds = [list(map(kind, section)) for section in (theirs, ours)]
        assert kinds[0] == kinds[1], f"what {named(english)} and {named(chinese)} have under {theirs[0]!r}"
        for original, translation in zip(theirs, ours, strict=True):
            differ = facts(original) ^ facts(translation)
            assert not differ, f"{differ} stand on one side alone, under {theirs[0]!r}: {original!r}, {translation!r}"
