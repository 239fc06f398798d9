"""engine/show.py: records in a terminal and as a page in a real browser.   pytest tests/test_show.py

Invariants: candidates stand in the order of R with the labels that the record has; a text is never
markup, script or terminal control; the page asks for nothing; what is left out is said.
"""

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

import llm
from engine import files

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = ("</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
        "<!--<script>\u2028\x1b[2J\x07 @data@ @policy@ 試 🍵")


def row(n: int, changed: bool = False, kind: str = "question answering", text: str = "", N: int = 20):
    """Candidate i of N has rank i + 1 by both, but for the seed, which stands last or first."""
    ids = [f"p{n}.{i}" for i in range(N)]
    return {"_id": f"q{n:07d}", "kind": kind, "task": f"a task of {kind}", "query": f"query number {n} {text}",
            "positive": {"title": f"Title {n}", "text": f"positive {text}"},
            "negative": {"title": text, "text": f"negative {text}"}, "symmetric": False,
            "seed_id": ids[-1 if changed else 0], "positive_id": ids[0], "negative_id": ids[-1],
            "candidates": [{"id": key, "ql": -1.0 - i, "rc": -0.5 - i, "R": 2 / (i + 1)} for i, key in
                           reversed(list(enumerate(ids)))]}


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def show(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["llm.py", "show", *map(str, arguments)])
    llm.main()


# --------------------------------------------------------------------------------------------------
# In a terminal


def test_text_has_ranks_and_labels_in_the_order_of_R(tmp_path, monkeypatch, capsys):
    write(tmp_path / "corpus.jsonl", [{"_id": "p1.1", "title": "Second", "text": "the second one"}])
    show(monkeypatch, write(tmp_path / "fret.jsonl", [row(0), row(1, changed=True)]), "--changed")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "q0000001 query number 1" and lines[1] == "  task: a task of question answering"
    assert lines[3].split() == ["1", "-1.000", "1", "-0.500", "1", "2.000", "p+", "Title", "1", "positive"]
    assert lines[4].split()[6:] == ["Second", "the", "second", "one"]
    assert lines[22].split()[:8] == ["20", "-20.000", "20", "-19.500", "20", "0.100", "p-", "seed"]
    assert lines[-1].endswith("2 records, p+ is not p_seed in 1; 1 of 1 shown (--limit)")
    assert lines[-2] == "no text here for 17 of the candidates; --corpus FILE gives it"


def test_text_says_what_is_left_out_and_what_has_no_score(tmp_path, monkeypatch, capsys):
    alone = row(0)
    for c in alone["candidates"]:
        c["ql"] = None                                               # --rank rc
    show(monkeypatch, write(tmp_path / "fret.jsonl", [alone, *map(row, range(1, 9))]), "--limit", "2")
    out = capsys.readouterr().out
    assert out.splitlines()[3].split()[:5] == ["1", "none", "-0.500", "1", "2.000"]
    assert out.splitlines()[-1].endswith("9 records, p+ is not p_seed in 0; 2 of 9 shown (--limit)")


def test_text_of_a_hostile_record_controls_no_terminal(tmp_path, monkeypatch, capsys):
    show(monkeypatch, write(tmp_path / "fret.jsonl", [row(0, text=EVIL)]))
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "</script>" in out
    out.encode()


@pytest.mark.parametrize("broken, message", [
    ({"candidates": None}, "no record with candidates; give a file"),
    ({"candidates": []}, "no record with candidates; give a file"),
    *(({"candidates": [{"id": "a", **broken}]}, "no record with candidates; give a file") for broken in (
        {}, {"ql": 0, "rc": 0, "R": float("nan")}, {"ql": 0, "rc": 0, "R": 10 ** 400},
        {"ql": 0, "rc": 0, "R": None}, {"id": [], "ql": 0, "rc": 0, "R": 1})),
    ({"query": 3}, 'no "query"; a record has'), ({"positive": "text"}, '"positive" has no text'),
    ({"query": "half a pair: \ud83d"}, "not JSON")])
def test_a_file_of_another_kind_is_one_line(tmp_path, monkeypatch, broken, message):
    path = write(tmp_path / "fret.jsonl", [row(0), {**row(1), **broken}])
    with pytest.raises(files.InputError, match=f"{path}:2: {message}"):
        show(monkeypatch, path)


def test_a_limit_below_nothing_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(files.InputError, match="--limit -1: give a number above 0"):
        show(monkeypatch, write(tmp_path / "fret.jsonl", [row(0)]), "--limit", "-1")


# --------------------------------------------------------------------------------------------------
# The page


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_page_is_self_contained_and_says_what_is_left_out(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "fret.jsonl", [row(n, n % 3 == 0, text=EVIL) for n in range(30)])
    show(monkeypatch, path, "--html", tmp_path / "a/page.html", "--changed", "--limit", "4")
    assert "30 records, p+ is not p_seed in 10; 4 of 10 shown" in capsys.readouterr().out
    page = (tmp_path / "a/page.html").read_text()
    elements = Elements(page).found
    assert [tag for tag, _ in elements].count("script") == 2 and "img" not in dict(elements)
    assert not re.search(r"https?://", page) and not any({"src", "href"} & set(a) for _, a in elements)
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [r["_id"] for r in data["records"]] == [f"q{n:07d}" for n in (0, 3, 6, 9)]
    assert data["records"][0]["query"] == row(0, text=EVIL)["query"] and "4 of 10 shown" in data["about"]


class Browser:
    """A headless Chromium, spoken to over a pipe: JSON messages with a zero byte after each."""

    def __init__(self, folder: Path) -> None:
        (read, out), (into, write) = os.pipe(), os.pipe()            # ours reads, its writes; and back
        self.into, self.out = open(write, "wb", buffering=0), open(read, "rb", buffering=0)
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                   "--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
        # subtle: it reads its file 3 and writes its file 4
        shell = f'exec 3<&{into} 4>&{out}; exec "$@"'
        self.process = subprocess.Popen(["bash", "-c", shell, "-", *command],
                                        pass_fds=(into, out), stderr=subprocess.DEVNULL)
        os.close(into)
        os.close(out)
        self.number, self.events, self.rest = 0, [], b""
        target = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if hasattr(self, "session"):
            message["sessionId"] = self.session
        self.into.write(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                part = self.out.read(1 << 16)
                assert part, "the browser has gone"
                self.rest += part
            line, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, path: Path) -> float:
        """Seconds until the page is drawn."""
        start = time.monotonic()
        self.send("Page.navigate", url=path.resolve().as_uri())
        while not self.js("document.readyState === 'complete' && location.protocol === 'file:'"):
            time.sleep(0.02)
        return time.monotonic() - start

    def js(self, expression: str):
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def type(self, text: str) -> None:
        self.js("document.getElementById('search').value = '';"
                "document.getElementById('search').focus()")
        self.send("Input.insertText", text=text)
        time.sleep(0.3)

    def choose(self, what: str, value: str) -> None:
        self.js(f"{what} = document.getElementById({what!r}); {what}.value = {value!r};"
                f"{what}.dispatchEvent(new Event('change'))")

    @property
    def count(self) -> str:
        return self.js("document.getElementById('count').textContent")

    def size(self, width: int, height: int, dark: bool = False) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)
        self.send("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        for file in (self.into, self.out):
            with contextlib.suppress(OSError):
                file.close()
        self.process.kill()
        self.process.wait(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no Chromium here: apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def test_page_in_a_browser_searches_and_filters(browser, tmp_path, monkeypatch):
    kinds = ("question answering", "fact checking")
    rows = [row(n, n % 5 == 0, kinds[n % 2], "zebra" if n == 77 else "") for n in range(120)]
    show(monkeypatch, write(tmp_path / "fret.jsonl", rows), "--html", tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    drawn = "document.querySelectorAll('details').length"
    assert browser.count == "120 of 120 records" and browser.js(drawn) == 50
    browser.js("document.getElementById('more').click()")
    assert browser.js(drawn) == 100
    browser.choose("kind", "fact checking")
    assert browser.count == "60 of 120 records"
    browser.choose("changed", "1")
    assert browser.count == "12 of 120 records"
    browser.choose("changed", "0")
    browser.type("ZEBRA query")
    assert browser.count == "1 of 120 records"
    browser.js("document.querySelector('summary').click()")
    time.sleep(0.2)
    cells = browser.js("[...document.querySelectorAll('tbody tr')].map(r => r.innerText.replace(/\\s+/g, ''))")
    assert len(cells) == 20 and cells[0].startswith("1-1(1)-0.5(1)2p+seedTitle77positivezebra")
    assert cells[19].startswith("20-20(20)-19.5(20)0.1p\u2212zebranegativezebra")
    for width in (320, 1200):
        browser.size(width, 800)
        assert browser.js("document.documentElement.scrollWidth") <= width, "it scrolls sideways"


def test_a_hostile_record_does_nothing_in_a_browser(browser, tmp_path, monkeypatch):
    huge = row(1, True, text="long" * 200_000)
    hostile = {**row(0, True, text=EVIL), "kind": EVIL, "task": EVIL, "seed_id": EVIL, "_id": EVIL}
    show(monkeypatch, write(tmp_path / "fret.jsonl", [hostile, huge]), "--html", tmp_path / "page.html")
    browser.events.clear()
    browser.open(tmp_path / "page.html")
    browser.js("for (const s of document.querySelectorAll('summary')) s.click()")
    time.sleep(0.3)
    assert browser.js("document.title") == "FRet records" and browser.js("document.images.length") == 0
    assert browser.js("document.scripts.length") == 2 and browser.count == "2 of 2 records"
    assert "</script><script>" in browser.js("document.querySelector('.query').textContent")
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert asked == [(tmp_path / "page.html").resolve().as_uri()]
    assert not [e for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    # negative control: a script that runs does change the title
    browser.js("s = document.createElement('script'); s.textContent = 'document.title = 1'")
    browser.js("document.body.append(s)")
    assert browser.js("document.title") == "1"
