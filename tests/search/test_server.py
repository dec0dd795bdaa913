"""The page: what its addresses answer, whom they refuse, and how a person uses it in a browser."""

import base64
import http.client
import io
import json
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import photo_library
import pytest
from PIL import Image

from internvl.search.encoder import Encoder
from internvl.search.searcher import Searcher
from internvl.search.server import PAGE, PageServer
from internvl.search.store import Store


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    dual = photo_library.load_dual(folder / "dual")
    names = [*photo_library.NAMES, *(f"more/{i}.png" for i in range(20))]
    photos = photo_library.library(folder / "photos", names)
    Image.new("RGB", (3000, 40), "green").save(photos / "wide.tif")
    index = photo_library.make(photos, folder / "index", dual, "cg")
    with Store(index) as store:
        searcher = Searcher(store, Encoder(lambda: dual, store.settings))
        with PageServer(searcher, 0) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            yield server
            server.shutdown()
            thread.join()


def ask(server, method, path, body=None, **headers):
    """(status, headers, body) of a request."""
    connection = http.client.HTTPConnection(*server.server_address)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, answer.headers, data


def search(server, **request):
    body = json.dumps(request)
    headers = {"Content-Type": "application/json"}
    status, _, data = ask(server, "POST", "/search", body, **headers)
    return status, json.loads(data)


def test_what_is_indexed(server):
    status, _, data = ask(server, "GET", "/about")
    root = str(server.searcher.store.root)
    about = {"folder": root, "photos": 26, "modes": ["c", "g"], "rerank": 1000}
    assert (status, json.loads(data)) == (200, about)


def test_a_search_answers_what_the_searcher_finds(server):
    status, answer = search(server, query="two cats:1 猫:-0.5", page_size=3, skip=2, rerank=6)
    assert (status, answer["total"], answer["skip"]) == (200, 26, 2)
    assert answer["terms"] == ["two cats", "猫 × -0.5"]
    assert [hit["rank"] for hit in answer["hits"]] == [3, 4, 5]
    assert all(0 <= abs(hit["match"]) <= 1 for hit in answer["hits"])
    (hit,) = search(server, query="a", folders=["e.png"])[1]["hits"]
    data = (server.searcher.store.root / "e.png").read_bytes()
    address = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    for term in ({"image": address}, {"digest": hit["digest"], "weight": 2}):
        best = search(server, terms=[term])[1]["hits"][0]
        assert (best["path"], round(best["score"], 4)) == ("e.png", 1)


def test_searches_at_the_same_time_are_those_one_by_one(server):
    queries = ["two cats", "red panda", "the sofa", "猫"] * 3
    alone = [search(server, query=query)[1]["hits"] for query in queries]
    with ThreadPoolExecutor(12) as threads:
        together = threads.map(lambda query: search(server, query=query)[1]["hits"], queries)
        assert [*together] == alone


def test_images_come_by_their_digests(server):
    wide = search(server, query="a", folders=["wide.tif"])[1]["hits"][0]["digest"]
    png = search(server, query="a", folders=["e.png"])[1]["hits"][0]["digest"]
    for address, form, size in (
        (f"/thumbnail/{wide}", "JPEG", (320, 4)),
        (f"/photo/{wide}", "JPEG", (2560, 34)),
        (f"/photo/{png}", "PNG", (80, 60)),
    ):
        status, headers, data = ask(server, "GET", address)
        assert (status, headers["X-Content-Type-Options"]) == (200, "nosniff")
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.size) == (form, size)
        assert headers["Content-Type"] == f"image/{form.lower()}"
    original = (server.searcher.store.root / "e.png").read_bytes()
    assert ask(server, "GET", f"/photo/{png}")[2] == original


@pytest.mark.parametrize(
    "path",
    [
        *("/photo/../../etc/passwd", "/photo/%2e%2e%2fe.png", "/thumbnail/e.png", "/nothing"),
        f"/photo/{'0' * 32}",
    ],
)
def test_no_address_leads_out_of_the_index(server, path):
    assert ask(server, "GET", path)[0] == 404


@pytest.mark.parametrize(
    ("request_body", "sentence"),
    [
        ({"query": ""}, "nothing to look for"),
        ({"query": "a", "mode": "x"}, "for --mode x index"),
        ({"query": "a", "since": "soon"}, "is no date"),
        ({"query": "a", "page_size": 0}, "at least 1 photo"),
        ({"query": "a", "page_size": 10**9}, "at most"),
        ({"query": "a", "colour": "red"}, "colour: Extra inputs"),
        ({"query": ["a"]}, "query: Input should be a valid string"),
        ({"terms": [{"image": "data:image/png;base64,AAAA"}]}, "nothing but zero bytes"),
        ({"terms": [{"image": "data:,%"}]}, "not base64"),
        ({"terms": [{"digest": "zz"}]}, "is no digest"),
    ],
)
def test_bad_requests_get_a_sentence(server, request_body, sentence):
    status, answer = search(server, **request_body)
    assert (status, sentence in answer["error"]) == (400, True), answer


def test_other_sites_cannot_ask(server):
    for host in ("evil.example", "[bad"):
        assert ask(server, "GET", "/about", Host=host)[0] == 403
    assert ask(server, "POST", "/search", "{}", **{"Content-Type": "text/plain"})[0] == 415
    assert ask(server, "GET", "/about", Host="localhost:1")[0] == 200
    headers = {"Content-Type": "application/json", "Content-Length": str(1 << 40)}
    assert ask(server, "POST", "/search", "{}", **headers)[0] == 413
    policy = ask(server, "GET", "/")[1]["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "'unsafe-inline'" not in policy.partition("style-src")[0]


def test_the_page_is_one_file_of_its_own_in_three_languages():
    page = PAGE.read_text("utf-8")
    assert re.findall(r"https?://|//cdn|@import|innerHTML|insertAdjacentHTML", page) == []
    texts = re.search(r"const TEXTS = \{(.*?)\n\};", page, re.DOTALL)[1]
    languages = re.findall(r"^  (\w\w): \{(.*?)^  \}", texts, re.DOTALL | re.MULTILINE)
    keys = {name: re.findall(r"[{,]?\s(\w+): \"", body) for name, body in languages}
    assert [*keys] == ["en", "zh", "ko"]
    assert keys["en"] == keys["zh"] == keys["ko"]
    used = {*re.findall(r'data-text="(\w+)"', page), *re.findall(r'say\("(\w+)"', page)}
    assert used == {*keys["en"]}


@pytest.mark.slow
def test_a_person_searches_in_a_browser(server, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    browser_path = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser_path is None:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for width, locale in ((1200, "en-US"), (390, "ko-KR")):
            context = browser.new_context(
                viewport={"width": width, "height": 800},
                locale=locale,
                color_scheme="dark" if width == 390 else "light",
            )
            page = context.new_page()
            said, hosts = [], set()
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.on("request", lambda request, hosts=hosts: hosts.add(request.url.split("/")[2]))
            _use(page, server, locale[:2], tmp_path / f"{width}.png")
            assert said == []
            assert {host for host in hosts if host} == {f"127.0.0.1:{server.server_address[1]}"}
            context.close()
        browser.close()


def _use(page, server, language, shot):
    from playwright.sync_api import expect

    page.goto(server.address)
    title = {"en": "Photo search", "ko": "사진 검색"}[language]
    expect(page).to_have_title(title)
    # By words, with a page after the first.
    page.fill("#query", "two cats")
    page.keyboard.press("Enter")
    page.wait_for_selector("#hits li")
    expect(page.locator("#hits li")).to_have_count(26)
    page.click("summary")
    page.select_option("#size", "20")
    expect(page.locator("#hits li")).to_have_count(20)
    page.click("#next")
    expect(page.locator("#hits li")).to_have_count(6)
    assert page.locator("#next").is_disabled()
    page.go_back()
    expect(page.locator("#hits li")).to_have_count(20)
    # A folder; its name is text, never markup.
    page.fill("#within", "2024")
    page.keyboard.press("Enter")
    expect(page.locator("#hits li")).to_have_count(2)
    expect(page.locator("#hits b", has_text="雪地 & <b>d.png")).to_have_count(1)
    page.fill("#within", "")
    page.fill("#rerank", "5")
    page.keyboard.press("Enter")
    expect(page.locator("#hits li")).to_have_count(20)
    expect(page.locator("#hits li:first-child .facts span")).to_have_count(3)
    # An image is dropped.
    page.fill("#query", "")
    data = base64.b64encode((server.searcher.store.root / "e.png").read_bytes()).decode()
    page.evaluate(
        """(data) => {
            const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
            const files = new DataTransfer();
            files.items.add(new File([bytes], "e.png", { type: "image/png" }));
            for (const name of ["dragenter", "dragover", "drop"])
                document.body.dispatchEvent(
                    new DragEvent(name, { dataTransfer: files, bubbles: true }));
        }""",
        data,
    )
    expect(page.locator("#hits b").first).to_have_text("e.png")
    expect(page.locator(".chip")).to_have_count(1)
    # The photo itself, and those like another one.
    page.click("#hits li:nth-child(2) button")
    expect(page.locator("#large")).to_have_js_property("naturalWidth", 80)
    second = page.locator("#path").inner_text()
    page.click("#similar")
    expect(page.locator("#hits b").first).to_have_text(second.split("/")[-1])
    page.select_option("#language", "zh")
    assert page.title() == "照片搜索"
    for index in range(4):
        expect(page.locator("#hits img").nth(index)).not_to_have_js_property("naturalWidth", 0)
    # Nothing is wider than the screen.
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.screenshot(path=shot)
