"""The page: whole, balanced, escaped, self-contained; and drawn by a real browser."""

import io
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from internvl import report
from internvl.report import cards, charts, markup

EVIL = "<script>alert('x')</script> & \"quoted\" </style>"
VOID = {"meta", "link", "img", "br", "hr"}


def drawing(color: str, size: tuple[int, int] = (64, 64), form: str = "PNG") -> bytes:
    image = Image.new("RGB", size, "white")
    width, height = size
    ImageDraw.Draw(image).ellipse((8, 8, width - 8, height - 8), fill=color, outline="black")
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def searches() -> list[report.Search]:
    """An image that comes second to a name, a name that comes first to an image, and one that is
    not shown."""
    images = [drawing(color) for color in ("crimson", "gold", "seagreen", "steelblue", "orchid")]
    names = ["cook medium skin tone", "cook light skin tone", "woman cook dark skin tone"]
    return [
        report.Search(
            language="en",
            text="cook light skin tone",
            rank=2,
            hits=[report.Hit(right=i == 1, image=p) for i, p in enumerate(images)],
        ),
        report.Search(
            language="en",
            image=drawing("tomato"),
            rank=1,
            hits=[report.Hit(right=i == 0, text=name) for i, name in enumerate(names)],
        ),
        report.Search(
            language="zh",
            text="厨师 较浅肤色",
            rank=1312,
            hits=[report.Hit(right=False, image=p) for p in images],
        ),
    ]


def boxed_card() -> report.Card:
    """Two images, the first with the box of the reference and one that leaves the image."""
    boxes = [
        report.Box(0.1, 0.25, 0.5, 0.75, "reference"),
        report.Box(-0.5, 0.9, 0.6, 1.5, "answer"),
    ]
    first = report.Drawing(image=drawing("teal", (320, 160)), size=(320, 160), boxes=boxes)
    return report.Card(
        images=[first, report.Drawing(image=drawing("gold"))],
        question="Where is the circle?",
        answers=[
            report.Answer(label="A", reference="", answer="[[1, 2, 3, 4]]", right=None, note="0.3")
        ],
        note="shapes",
    )


def full_report() -> report.Report:
    loss = [(float(x), 6 * math.exp(-x / 90) + 0.25 + 0.2 * math.sin(x)) for x in range(0, 600, 3)]
    curves = {"English": 0.43, "Chinese": 0.55, "Korean": 0.5}
    scores = [
        report.Score(group=group, name=name, before=before, after=after, best=best, form=form)
        for group, exact in curves.items()
        for name, before, after, best, form in [
            ("exact names", 0.0, exact, 1.0, ".1%"),
            ("BLEU-4", 0.012, exact + 0.12, 1.0, ".3f"),
            ("CIDEr", None, 10 * exact - 0.6, 10.0, ".2f"),
        ]
    ]
    cards = [
        report.Card(
            images=[report.Drawing(image=drawing(color))],
            answers=[
                report.Answer(
                    language="en",
                    reference="woman astronaut medium skin tone",
                    answer="woman astronaut medium skin tone",
                    right=True,
                ),
                report.Answer(
                    language="zh",
                    reference="女宇航员 中等肤色",
                    answer="女宇航员 较深肤色",
                    right=False,
                ),
                report.Answer(
                    language="ko",
                    reference="여자 우주비행사 갈색 피부",
                    answer="여자 우주비행사 갈색 피부",
                    right=True,
                ),
            ],
        )
        for color in ("crimson", "gold", "seagreen", "steelblue", "orchid", "tomato")
    ]
    sample = report.TrainingSample(
        name="train.jsonl, line 12",
        images=[
            report.TiledImage(image=drawing("teal", (320, 180)), columns=3, rows=2, thumbnail=True)
        ],
        spans=[
            report.Span("<|im_start|>user\n<img><IMG_CONTEXT> × 1792</img>\nWhat is this?", False),
            report.Span("<|im_end|>\n<|im_start|>assistant\n", False),
            report.Span("woman astronaut medium skin tone<|im_end|>", True),
        ],
        note="7 tiles, 1,816 tokens, 8 of them supervised.",
    )
    return report.Report(
        title="InternVL in five minutes",
        subtitle="A tiny InternVL learns to name images in three languages, on a CPU.",
        sections=(
            report.Text(
                title="What ran",
                paragraphs=["Everything on this page was measured by one command."],
                commands=["internvl demo", "internvl chat runs/demo --image cat.png"],
            ),
            report.Facts(
                title="At a glance",
                facts=[
                    ("317", "samples per second"),
                    ("3.5 M", "parameters"),
                    ("265 s", "training"),
                    ("406", "new images"),
                ],
            ),
            report.Scores(title="Before and after", scores=scores, note="Chinese on characters."),
            report.Charts(
                title="Learning",
                charts=[
                    report.Chart(
                        title="Loss",
                        x_label="step",
                        y_label="loss per token (nats)",
                        series=[report.Series(name="training", points=loss)],
                        from_zero=True,
                    ),
                    report.Chart(
                        title="Exact names on images never seen",
                        x_label="step",
                        y_label="share",
                        form=".0%",
                        from_zero=True,
                        series=[
                            report.Series(
                                name=name, points=[(x, top * x / 600) for x in range(0, 601, 100)]
                            )
                            for name, top in curves.items()
                        ],
                    ),
                ],
            ),
            report.Images(title="Answers", cards=cards),
            report.Differences(
                title="Compared",
                first="A",
                second="B",
                rows=[
                    report.Difference(
                        group="vqa", name="accuracy", first=0.5, second=0.6, interval=(0.02, 0.18)
                    ),
                    report.Difference(
                        group="vqa",
                        name="length",
                        first=9.0,
                        second=8.0,
                        interval=(-0.3, -0.1),
                        neutral=True,
                    ),
                    report.Difference(group="mme", name="OCR", first=None, second=110.0),
                ],
            ),
            report.Properties(title="Settings", pairs=[("tiles", "12")]),
            report.Group(
                title="One benchmark",
                sections=[report.Images(title="Worst", cards=[boxed_card()], roomy=True)],
            ),
            report.Searches(title="Found", searches=searches()),
            report.Samples(title="What the model sees", samples=[sample]),
            report.Attribution(
                title="Whose work this is",
                text="OpenMoji, CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/.",
            ),
        ),
    )


class Balance(HTMLParser):
    """Fails on a tag that is closed wrongly; keeps every attribute seen."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_every_section_is_there_and_the_page_is_balanced():
    page = report.render(full_report())
    parser = parse(page)
    for section in full_report().sections:
        assert section.title in parser.text
    ids = [value for _, name, value in parser.seen if name == "id"]
    assert len(ids) == len(set(ids)) == len(full_report().sections)
    assert page.count('class="right"') == 12 + 2
    assert page.count('class="wrong"') == 6
    assert page.count("✓") == 12 + 2
    assert page.count("✗") == 6


def test_nothing_is_loaded_from_elsewhere():
    page = report.render(full_report())
    parser = parse(page)
    for tag, name, value in parser.seen:
        if "//" in value:
            assert (tag, name) == ("a", "href")
        if name in ("src", "srcset", "poster", "data") or (name == "href" and tag != "a"):
            assert value.startswith("data:")
    style = page.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert ("a", "href", "https://creativecommons.org/licenses/by-sa/4.0/") in parser.seen


def test_a_search_shows_its_query_its_rank_and_the_right_result():
    by_name, by_image, missed = map(cards._search, searches())
    assert by_name.count("<img") == len(searches()[0].hits)
    items = by_name.split("<li")[1:]
    assert [i for i, item in enumerate(items) if "✓" in item] == [1]
    assert 'class="rank wrong">rank 2<' in by_name
    assert by_image.count("<img") == 1
    assert 'class="rank right">rank 1<' in by_image
    assert "✓" not in missed
    assert "rank 1,312" in missed


def evil_sections() -> list[report.Section]:
    answer = report.Answer(
        language=EVIL, label=EVIL, reference=EVIL, answer="a" + EVIL, right=False, note=EVIL
    )
    tiled = report.TiledImage(image=drawing("red"), columns=2, rows=1)
    box = report.Box(0.1, 0.1, 0.5, 2.0, "answer")
    pictured = report.Drawing(image=drawing("red"), size=(64, 64), boxes=[box])
    row = report.Difference(group=EVIL, name=EVIL, first=0.1, second=None)
    sample = report.TrainingSample(
        name=EVIL, images=[tiled], spans=[report.Span(EVIL, True)], note=EVIL
    )
    chart = report.Chart(
        title=EVIL, x_label=EVIL, y_label=EVIL, series=[report.Series(name=EVIL, points=[(0, 1)])]
    )
    return [
        report.Text(title=EVIL, paragraphs=[EVIL], commands=[EVIL]),
        report.Facts(title=EVIL, facts=[(EVIL, EVIL)], note=EVIL),
        report.Scores(
            title=EVIL, scores=[report.Score(group=EVIL, name=EVIL, before=None, after=0.5)]
        ),
        report.Charts(title=EVIL, charts=[chart], note=EVIL),
        report.Images(
            title=EVIL,
            cards=[report.Card(images=[pictured], answers=[answer], question=EVIL, note=EVIL)],
            note=EVIL,
        ),
        report.Searches(
            title=EVIL,
            searches=[
                report.Search(
                    language=EVIL, text=EVIL, rank=2, hits=[report.Hit(right=True, text=EVIL)]
                )
            ],
            note=EVIL,
        ),
        report.Samples(title=EVIL, samples=[sample], note=EVIL),
        report.Attribution(title=EVIL, text=f"{EVIL} https://example.org/\"onclick='x'"),
        report.Differences(title=EVIL, first=EVIL, second=EVIL, rows=[row], note=EVIL),
        report.Properties(title=EVIL, pairs=[(EVIL, EVIL)], note=EVIL),
        report.Group(title=EVIL, sections=[report.Text(title=EVIL, paragraphs=[EVIL])], note=EVIL),
    ]


@pytest.mark.parametrize("section", evil_sections(), ids=lambda s: type(s).__name__)
def test_text_is_escaped_everywhere(section: report.Section):
    page = report.render(report.Report(title=EVIL, subtitle=EVIL, sections=(section,)))
    assert "<script" not in page
    parser = parse(page)
    assert EVIL in parser.text
    assert not [name for _, name, _ in parser.seen if name.startswith("on")]


def test_a_missing_score_is_a_dash_and_bars_stay_inside():
    scores = [
        report.Score(group="en", name="too good", before=-1.0, after=7.0),
        report.Score(group="en", name="lost", before=None, after=math.nan),
    ]
    section = report.Scores(title="t", scores=scores)
    page = report.render(report.Report(title="t", subtitle="", sections=(section,)))
    assert re.findall(r"width:([\d.]+)%", page) == ["0.00", "100.00"]
    assert page.count(">–<") == 2


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(0.0, 5.0)],
        [(0.0, 0.0), (1.0, 0.0)],
        [(0.0, math.nan), (1.0, math.inf)],
        [(0.0, 1e-12), (1.0, 1e12)],
        [(1e6, 2.0), (1e6 + 1, 2.0 + 1e-9)],
    ],
)
def test_any_curve_is_drawn_without_a_number_that_is_none(points: list[tuple[float, float]]):
    chart = report.Chart(
        title="t", x_label="x", y_label="y", series=[report.Series(name="s", points=points)]
    )
    page = charts.chart_svg(chart)
    assert "nan" not in page
    assert "inf" not in page


def test_a_value_that_is_not_finite_leaves_a_gap():
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, math.nan), (3.0, 2.0), (4.0, 1.0)]
    chart = report.Chart(
        title="t", x_label="x", y_label="y", series=[report.Series(name="s", points=points)]
    )
    assert charts.chart_svg(chart).count("<polyline") == 2


def test_ticks_are_round_and_cover_the_values():
    axis = charts.axis([0.013, 0.547], loose=True)
    assert axis.ticks == [0.0, 0.2, 0.4, 0.6]
    assert (axis.low, axis.high) == (0.0, 0.6)
    assert charts.axis([0.0, 1312.0]).ticks == [0, 500, 1000]


def test_a_table_has_no_column_without_text():
    rows = [("15", "there is no image <a>", "", ""), ("1", "not JSON", "line 3", "")]
    head = ("count", "problem", "first places", "what keeps them")
    page = report._table(report.Table(title="t", head=head, rows=rows))
    assert "what keeps them" not in page
    assert page.count("<td") == 6
    assert "there is no image &lt;a&gt;" in page


def test_bars_stand_on_zero_and_name_what_they_count():
    points = [(0.5, 61.0), (1.5, 61.0), (1.5, 0.0), (4.5, 0.0), (4.5, 1.0), (5.5, 1.0)]
    chart = report.Chart(
        title="tiles a sample",
        x_label="tiles",
        y_label="samples",
        series=[report.Series(name="samples", points=points)],
        form=",.0f",
        from_zero=True,
        bars=True,
    )
    page = charts.chart_svg(chart)
    for title in ("1: 61 samples", "2 to 4: 0 samples", "5: 1 samples"):
        assert f"<title>{title}</title>" in page
    tops = re.findall(r'<rect x="[\d.]+" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', page)
    assert len({float(top) + float(height) for top, height in tops}) == 1
    assert "<polyline" not in page
    assert "legend" not in page
    # Whole numbers alone: one bin has one tick.
    assert charts.axis([0.5, 1.5], whole=True).ticks == [1]
    assert charts.axis([0.5, 12.5], whole=True).ticks == [5, 10]


def test_boxes_lie_where_they_should_and_end_with_the_image():
    drawn = cards._card(boxed_card())
    rectangles = re.findall(
        r'<rect class="(\w+)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', drawn
    )
    assert rectangles == [
        ("reference", "32.0", "40.0", "128.0", "80.0"),
        ("answer", "0.0", "144.0", "192.0", "16.0"),
    ]
    assert drawn.count("<img") == 1
    assert "Where is the circle?" in drawn
    # Without a score there is no verdict, and without a reference nothing was expected.
    assert "✓" not in drawn
    assert "✗" not in drawn
    assert 'reference"' not in drawn.partition("</svg>")[2]


def test_intervals_share_a_scale_and_a_colour_only_if_they_leave_out_zero():
    def row(low: float, high: float, **options: bool) -> report.Difference:
        return report.Difference(
            group="g", name="n", first=0.5, second=0.6, interval=(low, high), **options
        )

    rows = [row(0.1, 0.4), row(-0.2, 0.2), row(-0.3, -0.1), row(-0.3, -0.1, neutral=True)]
    section = report.Differences(title="t", first="A", second="B", rows=rows)
    page = report.render(report.Report(title="t", subtitle="", sections=(section,)))
    drawn = re.findall(r'class="interval (\w*)".*?left:([\d.]+)%;width:([\d.]+)%', page)
    assert drawn == [
        ("better", "62.50", "37.50"),
        ("", "25.00", "50.00"),
        ("worse", "12.50", "25.00"),
        ("", "12.50", "25.00"),
    ]
    assert "+0.100 … +0.400" in page


def test_tiles_are_cut_and_numbered_with_the_thumbnail_last():
    tiled = report.TiledImage(image=drawing("red"), columns=3, rows=2, thumbnail=True)
    drawn = cards._tiled(tiled)
    assert re.findall(r">(\d+)</text>", drawn) == ["1", "2", "3", "4", "5", "6", "7"]
    assert 'd="M100 0V200M200 0V200M0 100H300"' in drawn
    with pytest.raises(ValueError, match="0 x 2 tiles"):
        cards._tiled(replace(tiled, columns=0))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP"])
def test_an_image_keeps_its_bytes_and_names_its_kind(form: str):
    assert markup.data_url(drawing("red", form=form)).startswith(f"data:image/{form.lower()};")


def test_bytes_that_are_no_image_are_refused():
    with pytest.raises(ValueError, match="no PNG, JPEG, GIF or WebP"):
        markup.data_url(b"<svg onload='x'>")


def test_writing_is_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "new" / "report.html"
    report.write(full_report(), path)
    before = path.read_text(encoding="utf-8")
    assert before == report.render(full_report())
    bad = report.Card(images=[report.Drawing(image=b"")], answers=[])
    section = report.Images(title="t", cards=[bad])
    with pytest.raises(ValueError, match="no PNG"):
        report.write(report.Report(title="t", subtitle="", sections=(section,)), path)
    assert path.read_text(encoding="utf-8") == before
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def screenshot(page: Path, to: Path, *, profile: Path, width: int, dark: bool) -> str:
    """Draws the page with a real browser; returns what the browser logged."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium on this machine")
    flags = [
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run",
        "--disable-background-networking --disable-component-update --disable-sync",
        "--hide-scrollbars --enable-logging=stderr --v=0",
        f"--user-data-dir={profile} --screenshot={to} --window-size={width},3000",
    ]
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [browser, *" ".join(flags).split(), *theme, page.as_uri()],
        capture_output=True,
        encoding="utf-8",
        timeout=3600,
        check=False,
    )
    assert to.is_file(), done.stderr
    return done.stderr


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (420, False)])
def test_a_browser_draws_it_without_complaint(tmp_path: Path, width: int, dark: bool):
    page, shot = tmp_path / "report.html", tmp_path / "shot.png"
    report.write(full_report(), page)
    logged = screenshot(page, shot, profile=tmp_path / "profile", width=width, dark=dark)
    assert "CONSOLE" not in logged
    with Image.open(shot) as image:
        colors = image.convert("RGB").getcolors(maxcolors=1 << 24)
    assert len(colors) > 200
    background = max(colors)[1]
    assert (sum(background) < 200) == dark
