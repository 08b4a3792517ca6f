"""Render and validate `deployments/` and `prefect.yaml`, without a deployment."""

from __future__ import annotations

import asyncio
import json
import re
import tomllib
from typing import Any
from uuid import UUID

import jsonschema
import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.events.schemas.automations import AutomationCore
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.utilities.schema_tools.validation import is_valid_schema
from prefect.utilities.schema_tools.validation import validate as validate_against_form
from prefect.utilities.templating import find_placeholders

from tests.helpers import ROOT
from vnp_lib.config import RuntimeConfig

TEMPLATE = json.loads((ROOT / "deployments/gpu-base-job-template.json").read_text())
VARIABLES = TEMPLATE["variables"]
JOB_SCHEMA = json.loads((ROOT / "tests/data/kubernetes-job-1.37.json").read_text())
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
WORKER = list(yaml.safe_load_all((ROOT / "deployments/worker.yaml").read_text()))
AUTOMATIONS = yaml.safe_load((ROOT / "deployments/automations.yaml").read_text())["automations"]
FLOW_RUN = FlowRun(id=UUID(int=1), flow_id=UUID(int=2), name="brave-tern")
A_CLUSTER_OF_OURS = {
    "image": "registry.test/vnp@sha256:0123",
    "gpus": 2,
    "gpu_product": "NVIDIA-H100-80GB-HBM3",
    "spot_key": "kubernetes.azure.com/scalesetpriority",
    "spot_value": "spot",
    "runs_claim": "our-runs",
    "runs_path": "/data/runs",
    "weights_claim": "our-weights",
    "weights_path": "/data/weights",
    "shm_size": "8Gi",
    "memory": "64Gi",
    "cpu": "8",
    "namespace": "embeddings",
    "service_account_name": "embedder",
    "env": {"VNP_FLAVOUR": "ours"},
}


def render_job(**job_variables: Any) -> dict[str, Any]:
    """Return the manifest that Prefect's Kubernetes worker sends to the cluster."""
    from prefect_kubernetes.worker import (
        KubernetesWorkerJobConfiguration,
    )

    with temporary_settings({PREFECT_API_URL: "http://prefect.test:4200/api"}):
        rendering = KubernetesWorkerJobConfiguration.from_template_and_values(
            TEMPLATE, job_variables, client=get_client()
        )
        configuration = asyncio.run(rendering)
        configuration.prepare_for_flow_run(FLOW_RUN)
    return configuration.job_manifest


def pod_of(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["template"]["spec"]


def container_of(job: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod_of(job)["containers"]
    return container


def environment_of(job: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container_of(job)["env"]}


def volumes_of(job: dict[str, Any]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Return the volumes of a container by mount path."""
    volumes = {volume["name"]: volume for volume in pod_of(job)["volumes"]}
    return {
        mount["mountPath"]: (mount, volumes[mount["name"]])
        for mount in container_of(job)["volumeMounts"]
    }


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return render_job()


class TestJobTemplate:
    def test_placeholders_and_variables_match(self):
        used = {
            placeholder.name for placeholder in find_placeholders(TEMPLATE["job_configuration"])
        }
        assert used == set(VARIABLES["properties"]) | {"env"}

    def test_prefect_accepts_its_variables_and_defaults(self):
        is_valid_schema(VARIABLES)
        defaults = {
            name: v["default"]
            for name, v in VARIABLES["properties"].items()
            if v.get("default") is not None
        }
        validate_against_form(defaults, VARIABLES, raise_on_error=True)
        validate_against_form(A_CLUSTER_OF_OURS, VARIABLES, raise_on_error=True)

    @pytest.mark.parametrize(
        "bad", [{"gpus": -1}, {"gpus": "two"}, {"run_as_user": 0}, {"backoff_limit": -1}]
    )
    def test_prefect_refuses_values_out_of_bounds(self, bad):
        assert validate_against_form(bad, VARIABLES, raise_on_error=False)

    def test_every_variable_has_a_description(self):
        assert [
            n
            for n, v in VARIABLES["properties"].items()
            if n != "cluster_config" and not v.get("title")
        ] == []
        assert [n for n, v in VARIABLES["properties"].items() if not v.get("description")] == []

    @pytest.mark.parametrize(
        "job_variables",
        [{}, A_CLUSTER_OF_OURS, {"backoff_limit": 3}],
        ids=["bare", "ours", "retries"],
    )
    def test_kubernetes_accepts_the_job(self, job_variables):
        jsonschema.Draft202012Validator.check_schema(JOB_SCHEMA)
        jsonschema.validate(
            render_job(**job_variables), JOB_SCHEMA, cls=jsonschema.Draft202012Validator
        )

    def test_the_schema_detects_a_misplaced_field(self, job):
        broken = json.loads(json.dumps(job))
        pod_of(broken)["completions"] = 1
        with pytest.raises(jsonschema.ValidationError, match="completions"):
            jsonschema.validate(broken, JOB_SCHEMA, cls=jsonschema.Draft202012Validator)


class TestJob:
    def test_prefect_restarts_it_and_not_kubernetes(self, job):
        assert job["spec"]["backoffLimit"] == 0
        assert pod_of(job)["restartPolicy"] == "Never"
        assert environment_of(job)["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"

    def test_with_retries_by_kubernetes_prefect_does_not(self):
        retried = render_job(backoff_limit=3)
        assert environment_of(retried)["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "relinquish"

    def test_it_has_time_to_save_its_work(self, job):
        assert pod_of(job)["terminationGracePeriodSeconds"] == 120
        assert RuntimeConfig().grace_s < 120

    def test_it_has_no_privileges(self, job):
        assert container_of(job)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        assert pod_of(job)["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "runAsGroup": 10001,
            "fsGroup": 10001,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        assert pod_of(job)["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod_of(job))

    def test_it_writes_to_volumes(self, job):
        volumes = volumes_of(job)
        assert set(volumes) == {"/runs", "/weights", "/dev/shm", "/tmp"}
        assert volumes["/runs"][1]["persistentVolumeClaim"] == {"claimName": "vnp-runs"}
        assert volumes["/weights"][0]["readOnly"] is True
        assert volumes["/dev/shm"][1]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
        assert volumes["/tmp"][1]["emptyDir"] == {"sizeLimit": "4Gi"}
        environment = environment_of(job)
        assert (environment["HOME"], environment["PREFECT_HOME"]) == ("/tmp", "/tmp/.prefect")

    def test_it_is_scheduled_on_preemptible_gpu_nodes(self, job):
        keys = {toleration["key"]: toleration for toleration in pod_of(job)["tolerations"]}
        assert keys["nvidia.com/gpu"]["operator"] == "Exists"
        assert keys["cloud.google.com/gke-spot"]["value"] == "true"
        assert pod_of(job)["nodeSelector"] == {}
        assert container_of(job)["resources"]["limits"]["nvidia.com/gpu"] == 1

    def test_it_sends_heartbeats(self, job):
        assert environment_of(job)["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"

    def test_every_variable_is_used(self):
        ours = render_job(**A_CLUSTER_OF_OURS)
        pod, container, volumes = pod_of(ours), container_of(ours), volumes_of(ours)
        assert container["image"] == "registry.test/vnp@sha256:0123"
        assert container["resources"] == {
            "requests": {"cpu": "8", "memory": "64Gi"},
            "limits": {"memory": "64Gi", "nvidia.com/gpu": 2},
        }
        assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
        assert {"key": "kubernetes.azure.com/scalesetpriority", "value": "spot"}.items() <= pod[
            "tolerations"
        ][1].items()
        assert volumes["/data/runs"][1]["persistentVolumeClaim"]["claimName"] == "our-runs"
        assert volumes["/data/weights"][1]["persistentVolumeClaim"]["claimName"] == "our-weights"
        assert volumes["/dev/shm"][1]["emptyDir"]["sizeLimit"] == "8Gi"
        assert (ours["metadata"]["namespace"], pod["serviceAccountName"]) == (
            "embeddings",
            "embedder",
        )
        environment = environment_of(ours)
        assert environment["VNP_FLAVOUR"] == "ours"
        assert environment["HOME"] == "/tmp", "an env of one's own takes nothing away"
        assert environment["TORCH_HOME"] == "/data/weights"


class TestWorker:
    SERVICE_ACCOUNT, ROLE, BINDING, DEPLOYMENT = WORKER

    def test_kubernetes_accepts_its_pod(self):
        pod_schema = JOB_SCHEMA | {"$ref": "#/$defs/io.k8s.api.core.v1.PodSpec", "properties": {}}
        del pod_schema["additionalProperties"]
        pod = self.DEPLOYMENT["spec"]["template"]["spec"]
        jsonschema.validate(pod, pod_schema, cls=jsonschema.Draft202012Validator)
        with pytest.raises(jsonschema.ValidationError, match="completions"):
            jsonschema.validate(
                pod | {"completions": 1}, pod_schema, cls=jsonschema.Draft202012Validator
            )

    def test_its_parts_refer_to_each_other(self):
        name = self.SERVICE_ACCOUNT["metadata"]["name"]
        assert self.DEPLOYMENT["spec"]["template"]["spec"]["serviceAccountName"] == name
        assert self.BINDING["subjects"] == [{"kind": "ServiceAccount", "name": name}]
        assert self.BINDING["roleRef"]["name"] == self.ROLE["metadata"]["name"]
        labels = self.DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
        assert self.DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels

    def test_it_runs_the_image_and_may_only_create_jobs(self):
        (container,) = self.DEPLOYMENT["spec"]["template"]["spec"]["containers"]
        assert container["image"] == VARIABLES["properties"]["image"]["default"]
        assert {
            rule["apiGroups"][0]: set(rule["verbs"]) & {"create", "delete"}
            for rule in self.ROLE["rules"]
        } == {
            "batch": {"create", "delete"},
            "": set(),
        }


@pytest.fixture(
    params=DEPLOYMENTS, ids=lambda deployment: f"{deployment['entrypoint']}/{deployment['name']}"
)
def deployment(request) -> dict[str, Any]:
    return request.param


class TestPrefectYaml:
    def test_a_second_run_waits_for_the_first(self, deployment):
        assert deployment["concurrency_limit"]["collision_strategy"] == "ENQUEUE"
        assert deployment["concurrency_limit"]["limit"] >= 1
        assert deployment["description"]
        assert {"vnp", "esm2"} <= set(deployment["tags"])

    def test_its_parameters_fit_the_flow(self, deployment):
        flow: Flow[Any, Any] = load_flow_from_entrypoint(str(ROOT / deployment["entrypoint"]))
        form = flow.parameters.model_dump_for_openapi()
        given = deployment.get("parameters", {})
        problems = validate_against_form(given, form, raise_on_error=False, ignore_required=True)
        assert [problem.message for problem in problems] == []

    def test_its_job_variables_are_in_the_template(self, deployment):
        if deployment["work_pool"]["name"] == "vnp-gpu":
            validate_against_form(
                deployment["work_pool"].get("job_variables", {}), VARIABLES, raise_on_error=True
            )


def test_every_field_of_a_run_has_a_title_and_description():
    """In Prefect's UI, where a run can be started."""
    flow: Flow[Any, Any] = load_flow_from_entrypoint(str(ROOT / "flows/embed.py:embed"))
    models = flow.parameters.model_dump_for_openapi()["definitions"]
    fields = {
        name: field for model in models.values() for name, field in model["properties"].items()
    }
    assert [name for name, field in fields.items() if not field.get("description")] == []
    assert fields["fasta"]["title"] == "FASTA files"
    assert fields["backoff_base_s"]["title"] == "Backoff base (s)"
    assert "esm2_t36_3B_UR50D" in fields["model"]["enum"]
    assert fields["checkpoint_time_threshold"]["exclusiveMaximum"] == 600


class TestAutomations:
    def test_prefect_accepts_them(self):
        for automation in AUTOMATIONS:
            AutomationCore.model_validate(automation)
        assert len({automation["name"] for automation in AUTOMATIONS}) == len(AUTOMATIONS)

    def test_they_react_to_events_of_the_flows(self):
        expected = {
            event for automation in AUTOMATIONS for event in automation["trigger"]["expect"]
        }
        ours = {event for event in expected if event.startswith("vnp.")}
        assert ours == {"vnp.shard.preempted", "vnp.sequence.quarantined", "vnp.run.completed"}


class TestImage:
    DOCKERFILE = (ROOT / "deployments/Dockerfile").read_text().replace("\\\n", " ")
    INSTRUCTIONS = tuple(
        line.split(maxsplit=1) for line in DOCKERFILE.splitlines() if re.match(r"[A-Z]+ ", line)
    )
    LOCK = (ROOT / "deployments/requirements.lock").read_text()

    def arguments_of(self, instruction: str) -> list[str]:
        return [arguments for name, arguments in self.INSTRUCTIONS if name == instruction]

    def test_it_does_not_run_as_root(self):
        assert self.arguments_of("USER") == ["10001:10001"]
        assert VARIABLES["properties"]["run_as_user"]["default"] == 10001
        after_user = [name for name, _ in self.INSTRUCTIONS][
            [name for name, _ in self.INSTRUCTIONS].index("USER") :
        ]
        assert not {"RUN", "COPY", "ADD"} & set(after_user)

    def test_copied_files_exist_and_hold_no_weights(self):
        assert self.arguments_of("ADD") == []
        sources = [
            source
            for arguments in self.arguments_of("COPY")
            if not arguments.startswith("--from=")
            for source in arguments.split()[:-1]
        ]
        assert sources
        assert [source for source in sources if not (ROOT / source).exists()] == []
        allowed = {
            line[1:]
            for line in (ROOT / ".dockerignore").read_text().splitlines()
            if line.startswith("!")
        }
        assert set(sources) == allowed
        assert not re.search(r"curl|wget|torch\.hub|\.pt\b", "\n".join(self.arguments_of("RUN")))

    def test_every_package_is_installed_by_its_hash(self):
        installs = [run for run in self.arguments_of("RUN") if "pip install" in run]
        assert all("--require-hashes" in run or "--no-index" in run for run in installs)
        pinned = re.findall(r"^([\w.-]+)==(\S+) ", self.LOCK, flags=re.MULTILINE)
        blocks = re.split(r"^(?=[\w.-]+==)", self.LOCK, flags=re.MULTILINE)[1:]
        assert len(blocks) == len(pinned) > 100
        assert all("--hash=sha256:" in block for block in blocks)

    def test_the_base_is_pinned(self):
        (base,) = self.arguments_of("ARG")
        assert re.fullmatch(r"CUDA_IMAGE=docker\.io/nvidia/cuda:[\d.]+-base-ubuntu24\.04", base)
        assert "${CUDA_IMAGE} AS python" in self.arguments_of("FROM")

    def test_the_lock_is_what_was_tested(self):
        """It has the versions of constraints.txt, and all of pyproject.toml (`make lock`)."""
        locked = dict(re.findall(r"^([\w.-]+)==(\S+) ", self.LOCK, flags=re.MULTILINE))
        constraints = dict(
            line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()
        )
        constraints = {
            re.sub(r"[-_.]+", "-", name).lower(): version for name, version in constraints.items()
        }
        assert {n: v for n, v in locked.items() if constraints.get(n, v) != v} == {}
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        wanted = {
            re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", spec)[0]).lower()
            for spec in project["dependencies"]
        }
        assert wanted - set(locked) == set()
