"""What the lines of MindIE's log mean: each row of the table, their order, and logs of any kind."""

from __future__ import annotations

import json
import os
import re
import time
from collections import deque

import pytest

from telechat_mindie.service.launch import log_advice
from telechat_mindie.service.launch.log_tail import LogTail
from telechat_mindie.service.launch.processes import Identity
from telechat_mindie.service.launch.rundir import LaunchPlan, RunDirectory, State
from telechat_mindie.service.launch.running import Launch

SAMPLES = {
    "port-taken": "[MIE04E020407] Management or Business or Metrics Http server listen port is occupied",
    "scheduler-port-taken": "[ERROR] Failed to bind to tcp address 127.0.0.1:8090, errno: 98",
    "config-value": "ScheduleParam.maxBatchSize [9000] is out of bound [5000]",
    "rank-table": "Parameter device_ip is invalid in ranktable file.",
    "config-permission": "Check path: config.json failed, by:  Check Other group permission failed: /m/config.json",
    "path-permission": "owner id diff: current process user id is 1000, file owner id is 0",
    "symlink": "[ERROR] Found symlink path: /models/telechat",
    "config-json": "Json file is invalid. Please check json format! ",
    "config-refused": "ConfigManager init exception: Failed to initialize ScheduleConfig from JSON.",
    "certificate": "[MIE04E02041C] Business Http ssl Initialize failed",
    "shared-memory": "[ERROR] Available shared memory size is not enough for all executors.",
    "process-group": "[MIE04E01011C] Failed to set process group. errno is 1",
    "model-type": "NotImplementedError: unsupported model type: telechat2",
    "ms-wrapper": "ModuleNotFoundError: No module named 'mindie_llm.modeling.model_wrapper.ms.mf_model_wrapper'",
    "worker-missing": "execvp mindie_llm_backend failed: No such file or directory",
    "module-missing": "ModuleNotFoundError: No module named 'llm_datadist'",
    "driver-library": "ImportError: libascend_hal.so: cannot open shared object file: No such file or directory",
    "cann-library": "ImportError: libascendcl.so: cannot open shared object file: No such file or directory",
    "library-missing": "ImportError: libatb.so: cannot open shared object file: No such file or directory",
    "static-tls": "OSError: libgomp.so.1: cannot allocate memory in static TLS block",
    "device-target": "RuntimeError: Unsupported device target Ascend. This process only supports one of the ['CPU'].",
    "version-mismatch": "[ERROR] ME(1): MindSpore version 2.1.1 and Ascend AI software version 1.84 does not match",
    "kernels-missing": "EH9999: [PID: 1] [PlatformInfo]init runtime platform info failed, SocVersion = Ascend910B2",
    "driver-old": "        Unsupport flags, flags=4[FUNC:StreamCreate][FILE:api_error.cc][LINE:300]",
    "npu-memory": "RuntimeError: NPU out of memory. Tried to allocate 9.00 GiB.",
    "kv-blocks": "[ERROR] Warmup failed. This could be caused by setting both `max_prefill_tokens` and",
    "npu-mem-size": "ValueError: npu_mem_size=-1 only support in parallel mode",
    "top-k": "RuntimeError: topk: k should be in [0, 512]",
    "visible-devices": "EE1001: [PID: 1] The argument is invalid.Reason: set ASCEND_RT_VISIBLE_DEVICES:1,0 error",
    "device-held": "dcmi model initialized failed, because the device is used. ret is -8020",
    "npu-smi": "FileNotFoundError: [Errno 2] No such file or directory: 'npu-smi'",
    "device-open": "[ERROR] Open device 3 failed, with error code 507033",
    "hccp-busy": "EJ0001: [PID: 1] Failed to initialize the HCCP process. Reason: Maybe the last",
    "scheduler-lost": "[ERROR] Failed to connect to the meta server node url: scheduler 127.0.0.1:8090.",
    "hccl": "RuntimeError: HCCL execute error, Exception: ACL stream synchronize failed",
    "model-dir": "telechat_mindie.errors.ModelDirError: /m: must hold exactly one yaml (found none)",
    "runner-input": "telechat_mindie.errors.InputError: world_size: does not fit the directory's weights",
    "tokenizer-pool": "[MIE04E02011C] Init process tokenizer pool failed.",
    "cann": "RuntimeError: CANN execute error, Exception: EZ9999: Inner Error!",
    "worker-killed": "[MIE04E010109] Process 4711 was terminated by signal 9 (Killed)",
    "init-request": "[ERROR] Failed to send initialization request to worker.",
    "engine": "[ERROR] [MIE04E02011C] [endpoint] Failed to init engine! Please check in the env MINDIE_LOG_PATH",
    "device-number": "[Error]: Invalid device ID.",
    "cann-code": "EZ1001: [PID: 1] Get regInfo failed, The binary_info_config.json of socVersion is not there",
    "mindie-code": "[MIE04E010101] nothing known",
}
ROWS = log_advice.table()["causes"]
CODES = {"cann-code": "EZ1001", "mindie-code": "MIE04E010101"}


def kind(id: str) -> str:
    return next(row.get("kind", "particular") for row in ROWS if row["id"] == id)


# ---- the rows ----


def test_every_row_of_the_table_is_recognized_by_its_line():
    assert list(SAMPLES) == [row["id"] for row in ROWS]
    for id, line in SAMPLES.items():
        cause = log_advice.find_cause(["something else", line, "[INFO] and more"])
        assert cause is not None and cause.id == CODES.get(id, id) and cause.line == line and cause.severity == "error"
        assert cause.advice and not re.search(r"[{}]|  ", cause.cause)


def test_every_row_has_a_kind_and_a_source():
    for row in ROWS:
        assert set(row) - {"kind"} == {"id", "pattern", "cause", "advice", "source"}
        assert row.get("kind", "particular") in log_advice.KINDS and row["source"]


@pytest.mark.parametrize(
    ("line", "id"),
    [
        ("The size of npuDeviceIds does not equal to modelInstanceNumber", "config-value"),
        ("The size of npuDeviceIds (subset) does not equal to worldSize", "config-value"),
        ("maxPrefillBatchSize [0] is less than [1]", "config-value"),
        ("[llm] [ERROR] The value of modelName must meet the following rules: The string length is", "config-value"),
        ("[llm] [ERROR] The value of modelParam.worldSize can not be 0.", "config-value"),
        ("The value of maxPrefillTokens should not be less than maxInputTokenLen.", "config-value"),
        ("[ParamChecker::CheckJsonParamType] maxLinkNum: missing compulsory field", "config-value"),
        ("[ERROR] Backend type only supports atb, ms, torch.", "config-value"),
        ("Warmup failed due to NPU out of memory when `npuMemSize` set to 51. Try to decrease", "npu-memory"),
        ("EE1001: The argument is invalid.Reason: Set visible device failed, invalid device=6", "visible-devices"),
        ("[ERROR] RUNTIME(42,x): set ASCEND_RT_VISIBLE_DEVICES:[4] error, input data rang[0-2)", "visible-devices"),
        ("[ERROR] DRV: halDeviceOpen failed, drvRetCode=87", "device-open"),
        ("RuntimeError: c10_npu::SetDevice(device_id_), error code is 507033", "device-open"),
        ("RuntimeError: HCCL function error: HcclGetRootInfo, error code is 15", "hccl"),
        ("[1] Communication_Error_Get_Socket(EI0006): Getting socket times out.", "hccl"),
        ("EI0004: [PID: 1] The ranktable or rank is invalid", "rank-table"),
        ("EI0008: The CANN versions are inconsistent", "driver-old"),
        ("EL0004: [PID: 1] Failed to allocate memory.", "npu-memory"),
        ("EL0005: The resources are busy.", "device-held"),
        ("EL0002: [PID: 1] The argument is invalid", "device-number"),
        ("dcmi module initialize failed. ret is -8005", "device-held"),
        ("/bin/sh: npu-smi: command not found", "npu-smi"),
        ("libdcmi.so: cannot open shared object file: No such file", "driver-library"),
        ("libge_runner.so: cannot open shared object file: No such file", "cann-library"),
        ("[ERROR] [MIE05E040001] llmManager_ init fail!", "init-request"),
        ("[ERROR] [MIE04E01011C] [daemon] Failed to init endpoint! Please check the service log", "engine"),
        ("[ERROR] [MIE04E02011C] [endpoint] Failed to init infer model instance", "engine"),
        ("[ERROR] ME(1): Can not find driver so(need by mindspore-ascend).", "driver-library"),
        ("The configName maxQueue is not found, use default value.", None),
        ("The value of topK must be in [0, 2147483647], but the topK is -3", None),  # of a request
    ],
)
def test_the_wordings_of_the_field(line, id):
    cause = log_advice.find_cause([line])
    assert (cause and cause.id) == id


@pytest.mark.parametrize("letter", "EZIJLTHKPQ")
def test_every_family_of_cann_codes_is_told(letter):
    cause = log_advice.find_cause([f"E{letter}7777: [PID: 4] something is wrong"])
    assert cause.id == f"E{letter}7777" and f"E{letter}7777" in cause.cause
    bare = log_advice.find_cause([f"E{letter}9999: Inner Error!", "        TraceBack (most recent call last):"])
    assert bare.id == "cann"
    detailed = log_advice.find_cause([f"E{letter}9999: Inner Error!", f"E{letter}9999: [PID: 1] it is the reason"])
    assert detailed.id == f"E{letter}9999" and detailed.line.endswith("it is the reason")


def test_error_codes_are_spelt_out():
    assert log_advice.find_cause([SAMPLES["mindie-code"]]).cause == (
        "MindIE says MIE04E010101, daemon, start: permission denied"
    )
    cause = log_advice.find_cause(["EI0005: [PID: 1] x"])
    assert cause.cause == "CANN says EI0005, of HCCL, the ranks' arguments differ"
    assert log_advice.explain_code("MIE05E01000A") == "MIE05E01000A, a card's memory did not suffice"
    assert log_advice.explain_code("EZ1001") == "EZ1001, of an operator"
    assert log_advice.explain_code("E19999") == "E19999, of GE"
    assert [log_advice.explain_code(code) for code in ("MIE99E999999", "ET0001")] == ["MIE99E999999", "ET0001"]


# ---- which one is the cause ----


def test_the_first_in_the_log_wins_and_what_follows_from_it_never():
    for lines in (
        [SAMPLES["npu-memory"], SAMPLES["hccl"], SAMPLES["init-request"], SAMPLES["engine"]],
        [SAMPLES["engine"], SAMPLES["cann-code"], SAMPLES["npu-memory"], SAMPLES["hccl"]],
    ):
        assert log_advice.find_cause(lines).id == "npu-memory"
    assert log_advice.find_cause([SAMPLES["hccl"], SAMPLES["npu-memory"]]).id == "hccl"
    assert log_advice.find_cause([SAMPLES["engine"], SAMPLES["cann-code"]]).id == "EZ1001"


@pytest.mark.parametrize("id", [id for id in SAMPLES if kind(id) == "particular"])
def test_warnings_come_after_every_error_and_info_never(id):
    text = re.sub(r"^\[ERROR\] |\[?MIE\w+\]? ?", "", SAMPLES[id])
    warned = f"[2025-11-05 20:32:25.735] [34] [28] [llm] [WARN] [x.cpp:98]  {text}"
    assert log_advice.find_cause([warned, SAMPLES["engine"]]).id == "engine"
    alone = log_advice.find_cause([warned])
    assert (alone.id, alone.severity) == (id, "warning") and "no error, but a warning" in alone.cause
    assert log_advice.find_cause([f"[2025-11-05] [34] [1] [llm] [INFO] [x.cpp:1] {text}"]) is None
    assert log_advice.find_cause([f"[INFO] PROFILING(42,x):2025-11-18 {SAMPLES[id]}"]) is None


def test_what_only_follows_is_shown_with_the_errors_before_it():
    lines = ["[ERROR] one", "[ERROR] two", "text", "[ERROR] three", SAMPLES["engine"]]
    cause = log_advice.find_cause(lines)
    assert cause.id == "engine" and cause.line.split(" / ") == ["[ERROR] two", "[ERROR] three", SAMPLES["engine"]]


def test_where_nothing_fits_the_last_errors_are_shown():
    lines = [f"[2026-01-01] [1] [1] [llm] [ERROR] [x.cpp:{n}] strange" for n in range(5)]
    cause = log_advice.find_cause([*lines, "[INFO] the end", "[WARN] Check Owner permission failed"])
    assert cause.id == "unknown" and cause.line.split(" / ") == lines[-3:] and "last errors" in cause.cause
    assert log_advice.find_cause(["[MIE04W01011A] Received exit signal[15]", "text", ""]) is None


def test_the_real_logs(shared):
    right = {
        "gpustack2221_modelName": "config-value",
        "gpustack3153_warn_permission": "npu-memory",
        "gpustack3894_listen": "port-taken",
        "gpustack3225_visible": "visible-devices",
        "gpustack1765_unsupported": "model-type",
        "wang_pid1": "process-group",
        "libascend_hal": "driver-library",
        "mindspore_no_ascend": "device-target",
        "set_device_507033": "device-open",
        "eh9999": "kernels-missing",
        "ranktable": "rank-table",
        "ms_ver_mismatch_warning": "version-mismatch",
        "ms_ee8888": "driver-old",
        "gpustack2221_only_endpoint": "engine",
        "success_mentions_shm_oom_retry": None,
    }
    cases = json.loads(shared("field/logs.json").read_text(encoding="utf-8"))
    found = {case["name"]: log_advice.find_cause(case["log"]) for case in cases}
    assert {name: cause and cause.id for name, cause in found.items()} == right
    assert [name for name, cause in found.items() if cause and cause.severity == "warning"] == [
        "ms_ver_mismatch_warning"
    ]
    assert "this host's" in found["gpustack3894_listen"].cause and "--init" in found["wang_pid1"].advice
    assert "above" in found["gpustack2221_only_endpoint"].advice


# ---- what launch makes of it ----


@pytest.fixture
def failed(tmp_path):
    """A launch that ended by itself, with the given lines in its log."""

    def make(*lines: str) -> Launch:
        run = RunDirectory(tmp_path / "m-1025")
        me = Identity.of(os.getpid())
        run.create(LaunchPlan("m-1025", "/m", "2.0", ("x",), {}, {}, {}, None, "m", me), "{}")
        run.write_state(State(me, me, 0.0, (), reason="ended", returncode=3))
        run.log.write_text("".join(f"{line}\n" for line in lines))
        launch = object.__new__(Launch)  # without a process
        launch.run, launch.plan, launch.on_line = run, run.plan(), lambda _line: None
        launch._tail, launch._lines = LogTail(run.log), deque(maxlen=3)
        launch._read()
        return launch

    return make


def test_a_warning_alone_is_not_made_the_cause(failed):
    said = str(failed(f"[1] [llm] [WARN] [x.cpp:1] {SAMPLES['config-permission']}")._failure("did not start", "Wait."))
    assert "did not start: it ended with status 3" in said and "no error, but a warning" in said
    assert "Wait. Repair the modes" in said


def test_info_does_not_push_the_cause_out(failed):
    launch = failed(SAMPLES["top-k"], *["[1] [llm] [INFO] [x.cpp:1] going on"] * 10)
    assert "the warm-up asked for more tokens" in str(launch._failure("did not start"))


def test_the_last_errors_are_shown_by_launch(failed):
    said = str(failed("[ERROR] one", "[ERROR] two")._failure("did not start"))
    assert "nothing in its log is a known cause" in said and "[ERROR] one / [ERROR] two" in said


# ---- logs of any kind ----


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_no_line_takes_long(row):
    """The words of each pattern, repeated over a whole line: what would make a pattern without bounds backtrack."""
    words = re.findall(r"[\w\[\]:. ]{3,}", row["pattern"]) or ["x"]
    pattern = re.compile(row["pattern"])
    for word in (*words, "".join(words), "a", " ", "k", "lib", "/"):
        line = (word * log_advice.MAX_LINE)[: log_advice.MAX_LINE]
        begin = time.process_time()
        pattern.search(line)
        assert time.process_time() - begin < 0.5, word


def test_a_long_log_of_any_encoding_is_read_in_passing(tmp_path):
    info = "[2025-11-05 20:32:25.735] [34] [1] [llm] [INFO] [x.cpp:1] 加载 weights\n".encode("gbk")
    (tmp_path / "log").write_bytes(
        info * 20_000 + b"\xff\xfe\x00" * 5000 + b"\n" + SAMPLES["top-k"].encode() + b"\n" + info
    )
    begin = time.process_time()
    cause = log_advice.find_cause(LogTail(tmp_path / "log").read())
    assert cause.id == "top-k" and time.process_time() - begin < 20
    assert log_advice.find_cause(["x" * 10_000_000]) is None


def test_lines_are_not_kept():
    def endless():
        for number in range(3000):
            yield f"[ERROR] strange {number}"
        yield SAMPLES["static-tls"]
        raise AssertionError("read on after a cause that nothing can beat")

    assert log_advice.find_cause(endless()).id == "static-tls"


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("[2026-01-01] [1] [1] [llm] [INFO] [executor.cpp:1] Execute command", "noise"),
        ("[2026-01-01] [1] [1] [llm] [ERROR] [executor.cpp:1] no", "error"),
        ("[2026-01-01 00:00:00.1] [MIE04E02011C] Failed to start http wrapper", "error"),
        ("ModuleNotFoundError: No module named 'x'", "error"),
        ("telechat_mindie.errors.ModelDirError: x", "error"),
        ("[MIE04W01011A] Received exit signal[15]", "warning"),
        ("[WARN] a warning", "warning"),
        ("[WARNING] ME(16848:1,MainProcess):2023-10-12 x [ERROR]", "warning"),
        ("[1] [llm] [INFO] [x.cpp:1] the peer said [ERROR] MIE04E02011C", "noise"),
        ("[2025-05-13 02:25:58.64217] [error] [36815] [hccl_runner.cpp:132] fail", "error"),
        ("[Error]: Invalid device ID.", "error"),
        ("2025-11-19 11:14:59.028 | ERROR    | __main__:doc_parse:95 | no", "error"),
        ("(Worker rank=3 pid=112081) ERROR 07-17 08:06:53 [x.py:487] no", "error"),
        ("WARNING:root:x", "warning"),
        ("INFO 07-17 08:06:53 x", "noise"),
        ("[EVENT] PROFILING(946748,main):2025-05-19", "noise"),
        ("/x.py:1: UserWarning: pkg_resources is deprecated", "noise"),
        ("LLM log default format: [yyyy-mm-dd] [ERROR]", "noise"),
        ("Daemon start success!", "text"),
        ("Information is not a level", "text"),
    ],
)
def test_levels(line, level):
    assert log_advice.level(line) == level
