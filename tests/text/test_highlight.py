from html.parser import HTMLParser

import pytest

from torsh_text import Entity
from torsh_text._highlight import highlight, label_colours, write_highlight


class Page(HTMLParser):
    """Reads a page as a browser does: tags with attributes, and the characters of each text."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.texts, self.legend, self._open, self._skip = [], [], "", "", 0
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("div", "ul"):
            self._open = tag
        if tag == "div":
            self.texts.append("")
        self._skip += tag == "small"

    def handle_endtag(self, tag):
        self._open = "" if tag in ("div", "ul") else self._open
        self._skip -= tag == "small"

    def handle_data(self, data):
        if self._open == "div" and not self._skip:
            self.texts[-1] += data
        elif self._open == "ul":
            self.legend += data


def entity(text, part, label="PER"):
    start = text.index(part)
    return Entity(part, label, start, start + len(part), 0.5)


EVIL = '<script>alert(1)</script> "double" \'single\' & <b onclick="x">'


@pytest.mark.parametrize("label", ["PER", EVIL, "'><img src=x onerror=alert(1)>"])
def test_nothing_gets_out_of_its_text(label):
    texts = [EVIL + " Ada " + EVIL, EVIL]
    found = [[entity(texts[0], "Ada", label)], [entity(EVIL, "<script>alert(1)</script>", label)]]
    source = highlight(texts, found, title=EVIL)
    page = Page(source)
    assert page.texts == texts
    assert page.legend == label + " 2"
    kinds = {"html", "head", "meta", "title", "style", "body", "h1", "ul", "li", "mark", "div"}
    assert {tag for tag, _ in page.tags} == kinds | {"small"}
    assert {name for _, attributes in page.tags for name in attributes} <= {
        "charset",
        "http-equiv",
        "content",
        "name",
        "class",
        "title",
    }
    marks = [attributes for tag, attributes in page.tags if tag == "mark"]
    assert [m["title"] for m in marks if "title" in m] == [label + " 0.50"] * 2


def test_marks_are_where_the_entities_are():
    text = "Ada and\n Bob  live in Oslo"
    found = [entity(text, "Oslo", "LOC"), entity(text, "Ada"), entity(text, "Bob")]
    source = highlight(text, found)
    assert Page(source).texts == [text]
    assert source.index(">Ada<small>PER") < source.index(">Bob<small>PER")
    assert source.index(">Bob<small>PER") < source.index(">Oslo<small>LOC")
    assert "</mark> and\n <mark" in source


def test_no_entities_at_all():
    assert Page(highlight("nothing", [])).texts == ["nothing"]
    assert Page(highlight([], [])).texts == []
    assert Page(highlight("", [])).texts == [""]


def _luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_labels_are_readable_and_apart():
    colours = list(label_colours([f"L{i}" for i in range(30)]).values())
    assert len(set(colours)) == 30
    dark = _luminance("#111111")
    # 7:1 is what WCAG 2.1 asks of text at its strictest level
    assert min((_luminance(c) + 0.05) / (dark + 0.05) for c in colours) >= 7


@pytest.mark.parametrize("bad", [Entity("Bob", "PER", 0, 3, 1.0), Entity("", "PER", 2, 2, 1.0)])
def test_refuses_entities_of_another_text(bad):
    with pytest.raises(ValueError, match="is not in its text"):
        highlight("Ada is here", [bad])


def test_refuses_what_does_not_fit():
    text = "Ada Lovelace"
    with pytest.raises(ValueError, match="overlaps the one before"):
        highlight(text, [entity(text, "Ada Lovelace"), entity(text, "Lovelace")])
    with pytest.raises(ValueError, match="2 texts and entities of 1"):
        highlight(["a", "b"], [[]])
    nested = r"entities holds list, where it should be a list of Entity, as text is one string"
    with pytest.raises(TypeError, match=nested):
        write_highlight("page.html", text, [[entity(text, "Ada")]])
    with pytest.raises(TypeError, match=r"entities\[0\] holds Entity, where it should be a list"):
        highlight([text], [entity(text, "Ada")])


def test_writes_a_file(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    text = "José \ud800 Ada"
    write_highlight(path, text, [entity(text, "José")], title="Names")
    assert path.read_text("utf-8") == highlight(
        text, [entity(text, "José")], title="Names"
    ).replace("\ud800", "&#55296;")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(ValueError, match="is not in its text"):
        write_highlight(path, "x", [entity(text, "José")])
    assert "José" in path.read_text("utf-8")
