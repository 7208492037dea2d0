"""Faults in `server/`."""

from tests.mutations.fault import Fault

AUTH = "tests/server/operation/test_auth.py"
GATE = "tests/server/operation/test_gate.py"
RESIDENCY = "tests/server/adapting/test_residency.py"
LIMITS = "tests/server/operation/test_limits.py"
RATES = "tests/server/operation/test_rate_limits.py"

FAULTS = (
    Fault(
        "server/adapting/residency.py",
        "unpinned = [slot for slot in in_the_way if not self._pinned(slot.found)]",
        "unpinned = list(in_the_way)",
        RESIDENCY,
        "pinned adapters are evicted",
    ),
    Fault(
        "server/adapting/residency.py",
        "            unpinned[0].leaving = True\n",
        "",
        RESIDENCY,
        "constant traffic keeps others out for ever",
    ),
    Fault(
        "server/adapting/residency.py",
        "            slot.users -= 1\n",
        "",
        RESIDENCY,
        "what was used once is never evicted",
    ),
    Fault(
        "server/operation/auth.py",
        "        check_local(scope, headers)\n\n    def _check_metrics",
        "\n    def _check_metrics",
        AUTH,
        "without an admin key the administration is open to the network",
    ),
    Fault(
        "server/operation/auth.py",
        'entry.group or f"key:',
        'entry.group or f"key:all" or f"key:',
        AUTH + " tests/server/operation",
        "all keys share one prefix cache",
    ),
    Fault(
        "server/operation/auth.py",
        "self._metrics_closed = self._metrics is not None or limited",
        "self._metrics_closed = self._metrics is not None",
        AUTH,
        "metrics tell the names that a limited key may not know",
    ),
    Fault(
        "server/operation/gate.py",
        'if state.phase == "draining" and is_model(path):',
        "if False:",
        GATE,
        "a draining server takes new requests",
    ),
    Fault(
        "server/operation/gate.py",
        "if self.state.in_flight >= most and is_model(path):",
        "if self.state.in_flight > most and is_model(path):",
        GATE,
        "one request too many at once",
    ),
    Fault(
        "server/operation/gate.py",
        "                self.state.leave()\n",
        "                pass\n",
        GATE,
        "the server is full after so many requests",
    ),
    Fault(
        "server/operation/limits.py",
        "replies = prompts * n * drawn",
        "replies = prompts * n",
        LIMITS,
        "`best_of_n` draws past the limit",
    ),
    Fault(
        "server/operation/limits.py",
        "if self._read > self._max_bytes:",
        "if False:",
        GATE + " " + LIMITS,
        "a body without a length may have any",
    ),
    Fault(
        "server/operation/rate_limits.py",
        "requests.taken(0 if refused else amounts[0])",
        "requests.taken(amounts[0])",
        RATES,
        "refused requests count and keep a caller out",
    ),
    Fault(
        "server/requests/profiles.py",
        "end for stream, c in terms if c > 0 for end",
        "end for stream, c in terms for end",
        "tests/server/requests tests/server/checks/test_end_tokens.py",
        "an anti-expert's own end token ends replies",
    ),
    Fault(
        "server/requests/report.py",
        'share(sum(report["kl_sum"] for report in reports))',
        'sum(report["kl_sum"] for report in reports)',
        "tests/server/requests tests/server/test_errors.py",
        "`mean_kl` is a sum",
    ),
)
