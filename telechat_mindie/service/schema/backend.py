"""BackendConfig: devices, instances, the TLS between machines, and the objects on model and schedule.

A bare `:line` is in backend_config.cpp; `c` marks a field compulsory in its table (:23-40).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr

from telechat_mindie.service.schema import deploy, schedule
from telechat_mindie.service.schema.base import MindieObject, Port

DeviceId = Annotated[StrictInt, Field(ge=0, le=2**64 - 1)]  # param_checker.cpp:238-259


class KvPoolConfig(MindieObject):
    """BackendConfig.kvPoolConfig (:42-57)."""

    backend: Literal["", "unifiedcache", "mooncake", "memcache"] = ""  # param_checker.cpp:389-398
    configPath: StrictStr = Field(default="", max_length=500)  # param_checker.cpp:400-407


class KvPoolConfig30(KvPoolConfig):
    """BackendConfig.kvPoolConfig of 3.0 (v3.0.0 src/config_manager/backend_config.cpp:40-58)."""

    asyncWrite: StrictBool = False


class LayerwiseNodes(MindieObject):
    """BackendConfig.layerwiseDisaggregated (:138-147), ATB only. Where the switch is given, false as well, the port is
    read without a test for its presence: `rules_backend.layerwise_nodes`."""

    layerwiseDisaggregatedMultiNodesInferEnabled: StrictBool = False
    layerwiseDisaggregatedMultiNodesCtrlPort: Port = 10003  # :229-232


class _Backend(MindieObject):
    backendName: StrictStr = Field(pattern=r"^[a-z]+(_[a-z]+)*$", max_length=50)  # c, param_checker.cpp:375-387
    modelInstanceNumber: StrictInt = Field(ge=1, le=10, description="copies of the model")  # c, :212
    npuDeviceIds: list[list[DeviceId]] = Field(description="one list of card numbers an instance")  # c, :158-184
    tokenizerProcessNumber: StrictInt = Field(ge=1, le=32)  # c, :215
    # Both switches are read without a test for their presence, which throws on a missing key (:186, :190).
    multiNodesInferEnabled: StrictBool = Field(description="one instance over several machines, by RANK_TABLE_FILE")
    multiNodesInferPort: Port = 1120  # :218
    interNodeTLSEnabled: StrictBool = Field(description="TLS between the machines of one instance")
    interNodeTlsCert: StrictStr = "security/grpc/certs/server.pem"  # :61
    interNodeTlsPk: StrictStr = "security/grpc/keys/server.key.pem"  # :62


class _NodeLists(MindieObject):
    """CA files and revocation lists as a folder and up to three names in it (:63-96)."""

    interNodeTlsCaPath: StrictStr = "security/grpc/ca/"
    interNodeTlsCaFiles: list[StrictStr] = Field(default=["ca.pem"])
    interNodeTlsCrlPath: StrictStr = "security/grpc/certs/"
    interNodeTlsCrlFiles: list[StrictStr] = Field(default=["server_crl.pem"])


class _NodePasswords(MindieObject):
    """Encrypted private keys, until 2.x (doc:99, 102-103)."""

    interNodeTlsPkPwd: StrictStr = "security/grpc/pass/mindie_server_key_pwd.txt"
    interNodeKmcKsfMaster: StrictStr = "tools/pmt/master/ksfa"
    interNodeKmcKsfStandby: StrictStr = "tools/pmt/standby/ksfb"


class BackendConfig(_Backend, _NodeLists):
    """BackendConfig of 3.0.0.beta."""

    kvPoolConfig: KvPoolConfig = KvPoolConfig()
    layerwiseDisaggregated: LayerwiseNodes = LayerwiseNodes()
    ModelDeployConfig: deploy.ModelDeployConfig
    ScheduleConfig: schedule.ScheduleConfig


class BackendConfig30(BackendConfig):
    """BackendConfig of 3.0."""

    kvPoolConfig: KvPoolConfig30 = KvPoolConfig30()
    ModelDeployConfig: deploy.ModelDeployConfig30
    ScheduleConfig: schedule.ScheduleConfig30


class BackendConfig20(BackendConfig, _NodePasswords):
    """BackendConfig of 2.x (sources: server.ServerConfig20)."""


class BackendConfig10(_Backend, _NodeLists, _NodePasswords):
    """BackendConfig of 1.0 (sources: server.ServerConfig10)."""

    interNodeTlsCaFile: StrictStr = "security/grpc/ca/ca.pem"
    interNodeTlsCrl: StrictStr = "security/grpc/certs/server_crl.pem"
    ModelDeployConfig: deploy.ModelDeployConfig10
    ScheduleConfig: schedule.ScheduleConfig10
