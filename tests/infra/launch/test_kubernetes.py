"""The JobSet manifest against the published models of JobSet and Kubernetes, and against our exit statuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api import models
from pydantic import ValidationError

from libs.flags.errors import ExitStatus

ROOT = Path(__file__).resolve().parents[3]
MANIFEST = ROOT / "infra" / "launch" / "kubernetes" / "jobset.yaml"
Json = dict[str, Any]


def manifest() -> Json:
    loaded: Json = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
    return loaded


def check(document: Json) -> None:
    """Types by the published models; a key they do not know is dropped by them, so it shows as a difference."""
    parsed = models.JobsetV1alpha2JobSet.from_dict(copy.deepcopy(document))
    assert parsed.to_dict() == document
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    for replicated in document["spec"]["replicatedJobs"]:
        check_job(replicated["template"]["spec"])


def check_job(job: Json) -> None:
    """Rules that the API server checks and the models do not."""
    pod = job["template"]["spec"]
    names = [container["name"] for container in pod["containers"]]
    assert pod["restartPolicy"] == "Never", "podFailurePolicy needs it"
    assert job["podReplacementPolicy"] == "Failed", "podFailurePolicy allows no other"
    for rule in job["podFailurePolicy"]["rules"]:
        assert rule["action"] in {"FailJob", "FailIndex", "Ignore", "Count"}
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule), "exactly one of the two"
        if codes := rule.get("onExitCodes"):
            values = codes["values"]
            assert codes["operator"] in {"In", "NotIn"}
            assert values == sorted(set(values))
            assert all(0 < value < 256 for value in values)
            assert codes["containerName"] in names
    mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert all(requests.get(name, limit) == limit for name, limit in limits.items()), "extended ones must be equal"


def job(document: Json) -> Json:
    found: Json = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    return found


def test_the_manifest_fits_the_published_schemas() -> None:
    check(manifest())


def _rule(document: Json, number: int = 0) -> Json:
    found: Json = job(document)["podFailurePolicy"]["rules"][number]
    return found


def _container(document: Json) -> Json:
    found: Json = job(document)["template"]["spec"]["containers"][0]
    return found


MUTATIONS: dict[str, Callable[[Json], object]] = {
    "misspelt key": lambda d: d["spec"].update(failurePolicies={}),
    "misspelt key of a job": lambda d: job(d).update(backofLimit=1),
    "misspelt key of a pod": lambda d: job(d)["template"]["spec"].update(hostnetwork=True),
    "text for a number": lambda d: job(d).update(backoffLimit="3"),
    "number for a text": lambda d: _container(d)["env"][0].update(value=8),
    "status 0": lambda d: _rule(d)["onExitCodes"].update(values=[0, 2]),
    "unsorted": lambda d: _rule(d)["onExitCodes"].update(values=[78, 2]),
    "no such container": lambda d: _rule(d)["onExitCodes"].update(containerName="trainer"),
    "no such action": lambda d: _rule(d).update(action="Fail"),
    "two requirements": lambda d: _rule(d).update(onPodConditions=[{"type": "DisruptionTarget", "status": "True"}]),
    "restarts in place": lambda d: job(d)["template"]["spec"].update(restartPolicy="OnFailure"),
    "two pods at once": lambda d: job(d).update(podReplacementPolicy="TerminatingOrFailed"),
    "volume that is not there": lambda d: job(d)["template"]["spec"]["volumes"].pop(),
    "other kind": lambda d: d.update(kind="JobSets"),
}


@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS)
def test_a_wrong_manifest_is_found(mutate: Callable[[Json], object]) -> None:
    document = manifest()
    mutate(document)
    with pytest.raises((AssertionError, ValidationError, ValueError)):
        check(document)


def _action(document: Json, status: int) -> str:
    """What Kubernetes does with a pod whose container ends with `status`: the first rule that matches."""
    for rule in job(document)["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if codes is not None and (status in codes["values"]) == (codes["operator"] == "In"):
            action: str = rule["action"]
            return action
    return "Count"


def test_every_exit_status_has_its_consequence() -> None:
    wanted = {
        ExitStatus.FAILURE: "Count",
        ExitStatus.USAGE: "FailJob",
        ExitStatus.NONFINITE: "FailJob",
        ExitStatus.REQUEUE: "Ignore",
        ExitStatus.GATE_REFUSED: "FailJob",
    }
    assert set(wanted) == set(ExitStatus) - {ExitStatus.OK}
    assert {status: _action(manifest(), status) for status in wanted} == wanted
    assert _action(manifest(), 137) == "Count"
    conditions = [rule["onPodConditions"] for rule in job(manifest())["podFailurePolicy"]["rules"][2:]]
    assert conditions == [[{"type": "DisruptionTarget", "status": "True"}]]
    (rule,) = manifest()["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_one_writer_of_a_run_and_a_process_for_each_gpu() -> None:
    assert (job(manifest())["parallelism"], job(manifest())["completions"]) == (1, 1)
    container = _container(manifest())
    (nproc,) = (entry["value"] for entry in container["env"] if entry["name"] == "NPROC")
    assert nproc == container["resources"]["limits"]["nvidia.com/gpu"]
    script, run_dir, *settings = container["command"]
    assert (ROOT / script).is_file()
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {"/" + run_dir.split("/")[1], "/" + settings[settings.index("--data.dir") + 1].split("/")[1]} <= mounts
    recipe = settings[settings.index("--recipe") + 1]
    assert (ROOT / "apps" / "train" / "recipes" / f"{recipe}.toml").is_file()
