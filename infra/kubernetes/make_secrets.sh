#!/bin/sh
# make_secrets.sh [FOLDER]: the Secrets that the servers, the worker and flows read, out of the files that make_secrets.py wrote
# (infra/docker/secrets unless given). No value passes through a process's arguments. Run it again after a change.
set -eu
cd "$(dirname "$0")/../.."
folder=${1:-infra/docker/secrets}
python3 infra/docker/make_secrets.py "$folder"
apply() { kubectl apply --server-side --field-manager=proving-ground -f -; }
kubectl create secret generic servers --namespace proving-ground-servers --dry-run=client -o yaml \
    --from-file="$folder/postgres_password" --from-file="$folder/prefect_database_password" \
    --from-file="$folder/mlflow_database_password" --from-file="$folder/mlflow_admin_password" \
    --from-file="$folder/flask_key" --from-file="$folder/prefect_auth" | apply
printf admin > "$folder/mlflow_admin_user"
kubectl create secret generic proving-ground-flow --namespace proving-ground --dry-run=client -o yaml \
    --from-file=PREFECT_API_AUTH_STRING="$folder/prefect_auth" --from-file=MLFLOW_TRACKING_USERNAME="$folder/mlflow_admin_user" \
    --from-file=MLFLOW_TRACKING_PASSWORD="$folder/mlflow_admin_password" | apply
