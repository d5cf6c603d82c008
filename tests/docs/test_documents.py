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


def rows(path: Path) -> list[list[str]]:
    """For each row of each table, the code in its first cell."""
    return [_CODE.findall(re.split(r"(?<!\\)\|", line)[1]) for line in prose(path).splitlines() if line.startswith("|")]


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
def test_a_chinese_document_has_the_table_rows_of_the_english_one(chinese: Path) -> None:
    assert rows(chinese) == rows(TRANSLATIONS[chinese])


@pytest.mark.parametrize("chinese", TRANSLATIONS, ids=named)
def test_a_chinese_document_has_the_list_items_and_pictures_of_the_english_one(chinese: Path) -> None:
    def count(path: Path, pattern: str) -> int:
        return len(re.findall(pattern, prose(path), re.MULTILINE))

    for pattern in (r"^ *- ", r"^ *\d+\. ", r"!\[", r"\]\(https?:"):
        assert count(chinese, pattern) == count(TRANSLATIONS[chinese], pattern), pattern
