import json
import socket
import threading
from itertools import pairwise

import pytest

from benchmarks import harness
from benchmarks.figures import calmest
from benchmarks.harness import Stream, read_stream
from benchmarks.peers import report
from benchmarks.peers.client import Answer, Request, Trace, drive
from benchmarks.peers.report import Measured
from benchmarks.peers.summary import Objective, disturbed_itls, itls, percentile, summarize
from benchmarks.peers.workloads import POISSON_RATES, WORKLOADS


def stream(*times: float, **facts: object) -> Stream:
    known = {
        "total": times[-1],
        "num_tokens": len(times),
        "num_prompt_tokens": 10,
        "num_cached_tokens": 0,
        "finish_reason": "length",
        "text": "x",
    }
    return Stream(times=times, **(known | facts))


def event(**chunk: object) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def content(text: str | None, **choice: object) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": text}, **choice}])


HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


class TestFigures:
    @pytest.mark.parametrize(("percent", "expected"), [(0, 1.0), (50, 2.5), (99, 3.97), (100, 4.0)])
    def test_a_percentile_lies_between_the_nearest_values(self, percent, expected):
        assert percentile([4.0, 1.0, 3.0, 2.0], percent) == pytest.approx(expected)

    def test_a_lone_value_is_every_percentile(self):
        assert percentile([7.0], 1) == percentile([7.0], 99) == 7.0

    def test_there_is_no_percentile_of_nothing(self):
        with pytest.raises(ValueError, match="no values"):
            percentile([], 50)

    def test_gaps_are_between_contents(self):
        assert itls(stream(1.0, 1.25, 2.0)) == [0.25, 0.75]

    @pytest.mark.parametrize(
        ("times", "met"),
        [((1.0, 1.1, 1.2), True), ((1.1, 1.15), False), ((0.5, 0.55, 1.0), False), ((1.0,), True)],
        ids=["in time", "late first", "slow on average", "one content"],
    )
    def test_an_objective_is_of_the_first_content_and_the_mean_gap(self, times, met):
        assert Objective(ttft=1.0, mean_itl=0.125).is_met(stream(*times)) is met

    def test_rates_are_of_all_tokens_over_all_seconds(self):
        answers = [Answer("", 0.0, stream(0.5, 1.0, 1.5)), Answer("", 3.0, stream(0.5, 0.6, num_tokens=5, total=1.0))]
        summary = summarize(Trace(answers, client_seconds=0.2))
        assert summary["seconds"] == 4.0
        assert summary["output_rate"] == 2.0
        assert summary["client_share"] == 0.05
        assert summary["ttft_p50"] == 0.5

    def test_goodput_counts_only_requests_that_meet_the_objective(self):
        answers = [Answer("", 0.0, stream(0.5, 0.55)), Answer("", 0.0, stream(1.5, 2.0))]
        assert summarize(Trace(answers, 0.0))["goodput"] == 0.5

    def test_decoding_is_measured_without_the_first_token(self):
        assert summarize(Trace([Answer("", 0.0, stream(2.0, 2.5, 3.0, num_tokens=11))], 0.0))["decode_rate"] == 10.0

    def test_the_decode_rate_of_several_streams_is_of_all_their_tokens_and_seconds(self):
        answers = [Answer("", 0.0, stream(1.0, 2.0, num_tokens=11)), Answer("", 2.0, stream(1.0, 4.0, num_tokens=11))]
        assert summarize(Trace(answers, 0.0))["decode_rate"] == 5.0

    def test_a_remembered_answer_has_no_decode_rate(self):
        assert "decode_rate" not in summarize(Trace([Answer("", 0.0, stream(0.01, num_tokens=64))], 0.0))

    def test_only_gaps_while_the_long_prompt_is_read_are_disturbed(self):
        others = Answer("", 0.0, stream(0.9, 1.2, 1.4, 2.2, 2.3, 2.4))
        long = Answer("long", 1.0, stream(1.25, 3.0))
        assert disturbed_itls([others, long]) == pytest.approx([0.3, 0.2, 0.8, 0.1])

    def test_repeated_requests_are_told_from_the_first(self):
        answers = [Answer("", 0.0, stream(5.0)), *(Answer("again", 6.0, stream(each)) for each in (0.1, 0.3, 0.2))]
        assert summarize(Trace(answers, 0.0))["again_e2e"] == 0.2

    def test_the_calmest_rounds_count(self, monkeypatch):
        stolen = iter([0.3, 0.0, 0.5, 0.01])
        monkeypatch.setattr(harness, "steal", lambda before, after: next(stolen))
        assert calmest(2, lambda number: number, at_most=4) == [1, 3]


class TestReading:
    def test_a_content_has_come_when_its_line_is_complete(self):
        whole = content("a")
        arrivals = [(0.1, HEAD), (0.2, content("")), (0.3, whole[:9]), (0.4, whole[9:] + content("b")), (0.5, b"0\r\n\r\n")]
        found = read_stream(arrivals)
        assert (found.times, found.total, found.text) == ((0.4, 0.4), 0.5, "ab")

    def test_neither_null_nor_absent_content_is_the_first(self):
        role = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": None}}])
        end = event(choices=[{"index": 0, "delta": {}, "finish_reason": "length"}])
        found = read_stream([(0.1, HEAD + role), (0.2, content("a")), (0.3, end)])
        assert (found.first, found.finish_reason) == (0.2, "length")

    def test_usage_is_believed_before_contents_are_counted(self):
        usage = {"completion_tokens": 9, "prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}
        found = read_stream([(0.1, HEAD), (0.2, content("a") + event(choices=[], usage=usage))])
        assert (found.num_tokens, found.num_prompt_tokens, found.num_cached_tokens) == (9, 5, 4)
        assert read_stream([(0.1, HEAD), (0.2, content("a") + content("b"))]).num_tokens == 2

    @pytest.mark.parametrize("answer", [b"HTTP/1.1 503 Busy\r\n\r\n{}", HEAD + content(None)], ids=["refused", "empty"])
    def test_what_is_no_answer_is_an_error(self, answer):
        with pytest.raises(RuntimeError):
            read_stream([(0.1, answer)])


@pytest.fixture
def echo():
    """A port whose server answers every connection with one content: the request's body."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.sendall(HEAD + content(connection.recv(4096).decode()))

    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=serve)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


class TestClient:
    def test_a_script_is_told_each_answer(self, echo):
        heard = []

        def script():
            heard.append((yield Request(b"one", role="r")).text)
            heard.append((yield Request(b"two", role="r")).text)

        trace = drive(echo, [script()])
        assert heard == [answer.stream.text for answer in trace.answers] == ["one", "two"]
        assert {answer.role for answer in trace.answers} == {"r"}

    def test_nothing_is_sent_before_its_time(self, echo):
        def script(request):
            yield request

        trace = drive(echo, [script(Request(b"late", at=0.05)), script(Request(b"early"))])
        assert [answer.stream.text for answer in trace.answers] == ["early", "late"]
        assert trace.answers[1].sent >= 0.05

    def test_what_wants_company_waits_for_it_or_for_the_end(self, echo):
        def script(request):
            yield request

        trace = drive(echo, [script(Request(b"held", beside=1)), script(Request(b"first")), script(Request(b"later", at=0.02))])
        assert [answer.stream.text for answer in trace.answers] == ["first", "later", "held"]

    def test_a_server_that_hangs_up_ends_the_run(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=lambda: listener.accept()[0].close())
            thread.start()
            with pytest.raises((RuntimeError, OSError)):
                drive(listener.getsockname()[1], WORKLOADS["one_stream"].scripts(0))
            thread.join()


def requests_of(script, answer):
    """All requests of a script that hears the same answer each time."""
    found = [next(script)]
    while True:
        try:
            found.append(script.send(answer))
        except StopIteration:
            return found


class TestWorkloads:
    @pytest.mark.parametrize(
        ("name", "num_clients", "num_requests"),
        [("concurrent_32", 32, 1), ("turns", 4, 4), ("long_prompt", 5, 1), ("repeated", 1, 4)],
    )
    def test_clients_and_their_requests(self, name, num_clients, num_requests):
        scripts = WORKLOADS[name].scripts(1)
        assert [len(requests_of(script, stream(0.1))) for script in scripts] == [num_requests] * num_clients

    def test_a_conversation_goes_on_from_the_servers_own_answer(self):
        *_, last = requests_of(WORKLOADS["turns"].scripts(0)[0], stream(0.1, text="Once upon"))
        messages = json.loads(last.payload.split(b"\r\n\r\n", 1)[1])["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * 3 + ["user"]
        assert messages[1]["content"] == "Once upon"

    @pytest.mark.parametrize("name", WORKLOADS)
    def test_each_round_asks_something_else_and_each_server_the_same(self, name):
        def payloads(number):
            return [script.send(None) for script in WORKLOADS[name].scripts(number)]

        assert payloads(1) == payloads(1)
        assert not {each.payload for each in payloads(1)} & {each.payload for each in payloads(2)}

    def test_only_what_is_repeated_may_be_remembered(self):
        assert b"no-store" not in WORKLOADS["repeated"].scripts(0)[0].send(None).payload
        assert b"no-store" in WORKLOADS["one_stream"].scripts(0)[0].send(None).payload

    def test_arrivals_are_as_many_as_their_rate_says(self):
        moments = [[next(script).at for script in WORKLOADS["poisson_high"].scripts(number)] for number in range(40)]
        assert all(earlier < later for each in moments for earlier, later in pairwise(each))
        assert 10 * POISSON_RATES["poisson_high"] == pytest.approx(sum(map(len, moments)) / 40, rel=0.15)


@pytest.fixture
def measured():
    def run(rate: float) -> dict[str, float]:
        return summarize(Trace([Answer("", 0.0, stream(1.0, 1.0 + 1 / rate))], 0.01)) | {"stolen": 0.01}

    rounds = [{"llmserve": run(110.0), "llama-server": run(100.0)}, {"llmserve": run(240.0), "llama-server": run(200.0)}]
    return Measured("one_stream", {"llmserve": "ours", "llama-server": "theirs"}, rounds)


class TestReport:
    def test_ratios_are_of_rounds(self, measured):
        (figure,) = report.figures({"one_stream": measured})
        assert figure.ours == pytest.approx([110.0, 240.0])
        assert figure.ratio == pytest.approx(1.15)
        assert figure.holds

    def test_the_table_has_a_row_for_each_server(self, measured, tmp_path):
        text = report.write({"one_stream": measured}, tmp_path)
        rows = [line for line in text.splitlines() if line.startswith(("| llmserve |", "| llama-server |"))]
        assert [row.count("|") for row in rows] == [rows[0].count("|")] * 2
        assert "TTFT ≤ 1 s and mean ITL ≤ 0.1 s" in text
        assert json.loads((tmp_path / "report.json").read_text())["figures"][0]["holds"]

    def test_workloads_are_kept_and_found_again(self, measured, tmp_path):
        report.keep(measured, tmp_path)
        assert report.kept(tmp_path) == {"one_stream": measured}

    def test_pictures_are_drawn_of_what_there_is(self, measured, tmp_path):
        pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
        from benchmarks.peers import plots

        plots.draw({"one_stream": measured, "poisson_low": measured._replace(workload="poisson_low")}, tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"workloads.png", "latencies.png", "poisson.png"}


@pytest.mark.slow
def test_llmserve_is_measured(tmp_path):
    pytest.importorskip("llama_cpp", reason="the extra `llamacpp` is not installed")
    from benchmarks.peers.__main__ import main

    assert (
        main(["--workloads", "repeated", "--servers", "llmserve", "--rounds", "1", "--results", str(tmp_path), "--no-plots"])
        == 0
    )
    (run,) = [each["llmserve"] for each in report.kept(tmp_path)["repeated"].rounds]
    assert run["num_cut"] == run["num_requests"] == 4
    assert run["num_tokens"] == 4 * 64
    assert run["again_e2e"] < run["e2e_p99"]
