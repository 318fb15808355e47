#!/usr/bin/env bash
# The whole once, on a kind cluster of this machine: images, operator, platform, a run, its record.
# Needs docker, kind, kubectl, helm and openssl, and about 4 CPUs and 12 GiB of memory.
# NOT RUN by its authors, who had no Docker: what it shows is yours to find out.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:-pipeline}

docker build -f k8s/Dockerfile --target run -t pipeline:0.1.0 .
docker build -f k8s/Dockerfile --target mlflow -t pipeline-mlflow:0.1.0 .
kind create cluster --name "$name"
trap 'kubectl get pods,rayjobs,events --namespace pipeline; kind delete cluster --name "$name"' EXIT
kind load docker-image --name "$name" pipeline:0.1.0 pipeline-mlflow:0.1.0

helm repo add kuberay https://ray-project.github.io/kuberay-helm/
helm install kuberay-operator kuberay/kuberay-operator --version 1.7.0 \
    --namespace kuberay-operator --create-namespace --wait

kubectl apply -f k8s/base/namespace.yaml
password=$(openssl rand -hex 16)
kubectl create secret generic mlflow-database --namespace pipeline \
    --from-literal="password=$password" \
    --from-literal="uri=postgresql+psycopg://mlflow:$password@postgres:5432/mlflow"
kubectl apply -k k8s/overlays/local
kubectl wait --namespace pipeline --for=condition=available --timeout=10m deployment/mlflow

python3 -m venv .venv-kind
.venv-kind/bin/pip install --quiet '.[k8s]' 'torch>=2.9,<2.14'
.venv-kind/bin/pipeline k8s doctor
.venv-kind/bin/pipeline k8s submit jobs/digits.yaml --set workers.num=2 --yes --json
# the same again tells the result, and trains nothing
.venv-kind/bin/pipeline k8s submit jobs/digits.yaml --set workers.num=2 --yes --json
kubectl run --namespace pipeline asks --rm --attach --restart=Never --image=pipeline:0.1.0 \
    --labels=app.kubernetes.io/component=ray --overrides="$(cat <<'JSON'
{"spec": {"securityContext": {"runAsNonRoot": true, "runAsUser": 1000,
  "seccompProfile": {"type": "RuntimeDefault"}}, "containers": [{"name": "asks",
  "image": "pipeline:0.1.0", "imagePullPolicy": "Never", "command": ["python", "-c",
  "import mlflow; mlflow.set_tracking_uri('http://mlflow:5000'); print(mlflow.search_runs(search_all_experiments=True)[['status']])"],
  "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}}]}}
JSON
)"
