"""ServerConfig: addresses, ports, TLS files and time limits of the HTTP server.

A comment names where MindIE reads or checks the field; `c` marks a field compulsory in its own table
(server_config.cpp:24-63). TLS paths are relative to MindIE's home directory.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr

from telechat_mindie.service.schema.base import Address, FileNames, Int32, MindieObject, Port


class HealthCheck(MindieObject):
    """ServerConfig.HealthCheckConfig."""

    npuUsageThreshold: StrictInt = Field(default=0, ge=0, le=100, description="percent of NPU use; 0 = off")  # :326-332


class _Common(MindieObject):
    """What all generations have."""

    ipAddress: Address = Field(description="business plane; the environment's MIES_CONTAINER_IP wins")  # c, :375, :623
    # :376, :633
    managementIpAddress: Address = Field(default="127.0.0.2", description="internal plane; absent: ipAddress")
    port: Port = Field(description="business plane")  # c, :379
    managementPort: Port = Field(default=1026, description="internal plane; absent: port")  # :300, :380
    metricsPort: Port = Field(description="Prometheus metrics, on managementIpAddress")  # c, :382
    # c, :384
    maxLinkNum: StrictInt = Field(ge=1, le=4096, description="requests served at once; twice as many may wait")
    httpsEnabled: StrictBool = Field(description="false: the tls* fields of this object are ignored")  # c, :347, :391
    fullTextEnabled: StrictBool = Field(default=False, description="a stream repeats the whole text each time")  # :311
    # c, :373
    inferMode: Literal["standard", "dmi"] = Field(description="dmi: prefill and decode on separate instances")
    openAiSupport: StrictStr = Field(default="vllm", description="anything else: OpenAI's own dialect")  # :362-367

    tlsCaPath: StrictStr = Field(default="security/ca/", description="folder of every plane's CA files")  # :465
    tlsCaFile: FileNames = Field(default=["ca.pem"])  # :461-470
    tlsCert: StrictStr = "security/certs/server.pem"  # :438
    # doc:34
    tlsPk: StrictStr = Field(default="security/keys/server.key.pem", description="private key, 3072 bits or more")
    managementTlsCaFile: FileNames = Field(default=["management_ca.pem"])  # :511-529
    managementTlsCert: StrictStr = "security/certs/management/server.pem"  # :487
    managementTlsPk: StrictStr = "security/keys/management/server.key.pem"  # :531

    interCommTLSEnabled: StrictBool = Field(default=True, description="TLS between instances; dmi only")  # :336
    interCommPort: Port = Field(default=1121, description="between instances; dmi only")  # :339-342
    interCommTlsCert: StrictStr = "security/grpc/certs/server.pem"  # :92
    interCommPk: StrictStr = "security/grpc/keys/server.key.pem"  # :110


class _KeyPasswords(MindieObject):
    """Encrypted private keys, until 2.x. v3.0.0.beta.2 documents these fields still, and no longer reads them."""

    tlsPkPwd: StrictStr = "security/pass/key_pwd.txt"  # doc:35
    managementTlsPkPwd: StrictStr = "security/pass/management/key_pwd.txt"  # doc:41
    metricsTlsPkPwd: StrictStr = "security/pass/metrics/key_pwd.txt"  # doc:47
    interCommPkPwd: StrictStr = "security/grpc/pass/key_pwd.txt"  # doc:59
    kmcKsfMaster: StrictStr = "tools/pmt/master/ksfa"  # doc:50
    kmcKsfStandby: StrictStr = "tools/pmt/standby/ksfb"  # doc:51


class _RevocationLists(MindieObject):
    """Revocation lists as a folder and up to three names in it (doc:36-37, 42-43, 60-61)."""

    tlsCrlPath: StrictStr = "security/certs/"  # :443-459
    tlsCrlFiles: list[StrictStr] = Field(default=["server_crl.pem"])
    managementTlsCrlPath: StrictStr = "security/management/certs/"  # :493-509
    managementTlsCrlFiles: list[StrictStr] = Field(default=["server_crl.pem"])
    interCommTlsCaPath: StrictStr = "security/grpc/ca/"  # :95
    interCommTlsCaFiles: list[StrictStr] = Field(default=["ca.pem"])  # :98
    interCommTlsCrlPath: StrictStr = "security/grpc/certs/"  # :113
    interCommTlsCrlFiles: list[StrictStr] = Field(default=["server_crl.pem"])  # :116


class ServerConfig(_Common, _RevocationLists):
    """ServerConfig of 3.0.0.beta."""

    allowAllZeroIpListening: StrictBool = Field(description="lets the two addresses be 0.0.0.0 or ::")  # c, :304, :375
    tokenTimeout: StrictInt = Field(ge=1, le=3600, description="seconds for one token")  # c, :386
    e2eTimeout: StrictInt = Field(ge=1, le=65535, description="seconds for one request")  # c, :388
    # Not in the table of compulsory fields, but read without a test for its presence, which throws on a missing key.
    distDPServerEnabled: StrictBool = Field(description="large-scale expert parallelism only")  # :312
    maxRequestLength: StrictInt = Field(default=40, ge=1, le=100, description="MB of a request's body")  # :321-325
    HealthCheckConfig: HealthCheck = HealthCheck()

    metricsTlsCaFile: FileNames = Field(default=["metrics_ca.pem"])  # :595-613
    metricsTlsCert: StrictStr = "security/certs/metrics/server.pem"  # :570
    metricsTlsPk: StrictStr = "security/keys/metrics/server.key.pem"  # :615
    metricsTlsCrlPath: StrictStr = "security/metrics/certs/"  # :576-593
    metricsTlsCrlFiles: list[StrictStr] = Field(default=["server_crl.pem"])

    # Model layers split between an edge and a cloud machine, ATB only (:203-252, :537-564).
    layerwiseDisaggregated: StrictBool = False
    layerwiseDisaggregatedRoleType: StrictStr = Field(default="", description="master or slave")
    layerwiseDisaggregatedMasterIpAddress: StrictStr = "127.0.0.3"
    layerwiseDisaggregatedSlaveIpAddress: list[StrictStr] = Field(default=["127.0.0.4"])
    layerwiseDisaggregatedDataPort: Int32 = 10024
    layerwiseDisaggregatedCrtlPort: list[StrictInt] = Field(default=[10001, 10002])  # MindIE's spelling


class ServerConfig30(ServerConfig):
    """ServerConfig of 3.0 (v3.0.0 src/config_manager/server_config.cpp:325-331)."""

    maxJsonDepth: StrictInt = Field(default=10, ge=10, le=100, description="levels of a request's body")


class ServerConfig20(ServerConfig, _KeyPasswords):
    """ServerConfig of 2.x: every field of 3.0.0.beta, and the passwords of encrypted keys.

    The source of 2.x is not public. Its field set is taken from the default file that gpustack/gpustack embeds
    (gpustack/worker/backends/ascend_mindie.py) and from doc, whose later fields are allowed here as well. 2.0.RC1 has
    no time limits and no distDPServerEnabled; of the later ones `rules_generation.EXPECTED` asks for them.
    """

    tokenTimeout: StrictInt = Field(default=600, ge=1, le=3600, description="seconds for one token")
    e2eTimeout: StrictInt = Field(default=600, ge=1, le=65535, description="seconds for one request")
    distDPServerEnabled: StrictBool = Field(default=False, description="large-scale expert parallelism only")


class ServerConfig10(_Common, _RevocationLists, _KeyPasswords):
    """ServerConfig of 1.0.RC3 and 1.0.0.

    The source of 1.0 is not public. Fields are those of two files of the MindSpore project: mindformers r1.3.0
    research/llama3_1/llama3_1.md:335-368 (1.0.RC3) and docs r2.6.0 docs/mindformers/docs/source_zh_cn/usage/
    mindie_deployment.md (1.0.0). Their ranges are assumed to be those of 3.0.0.beta.
    """

    allowAllZeroIpListening: StrictBool = Field(default=False, description="lets the two addresses be 0.0.0.0 or ::")
    tlsCrl: StrictStr = "security/certs/server_crl.pem"
    managementTlsCrl: StrictStr = "security/certs/management/server_crl.pem"
    interCommTlsCaFile: StrictStr = "security/grpc/ca/ca.pem"
    interCommTlsCrl: StrictStr = "security/certs/server_crl.pem"
    # 1.0.RC3 only: later interComm*.
    pdInterNodeTLSEnabled: StrictBool = False
    pdCommunicationPort: Port = 1121
    interNodeTlsCaFile: StrictStr = "security/grpc/ca/ca.pem"
    interNodeTlsCert: StrictStr = "security/grpc/certs/server.pem"
    interNodeTlsPk: StrictStr = "security/grpc/keys/server.key.pem"
    interNodeTlsPkPwd: StrictStr = "security/grpc/pass/key_pwd.txt"
    interNodeKmcKsfMaster: StrictStr = "tools/pmt/master/ksfa"
    interNodeKmcKsfStandby: StrictStr = "tools/pmt/standby/ksfb"
