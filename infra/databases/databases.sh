#!/bin/sh
# Runs once, when PostgreSQL's data folder is new: a role and databases for each server, which see nothing of each other.
# Passwords come from files, through psql's variables: never as text of a statement in a log.
set -eu
secrets=${SECRETS:-/run/secrets}
# psql goes on with an empty password where a file cannot be read.
for name in prefect mlflow; do
    cat "$secrets/${name}_database_password" > /dev/null
    test -s "$secrets/${name}_database_password" || { echo "$secrets/${name}_database_password is empty" >&2; exit 1; }
done
psql -v ON_ERROR_STOP=1 --no-psqlrc --quiet --username "${POSTGRES_USER:-postgres}" --dbname postgres <<SQL
set log_statement = 'none';
\set prefect \`cat '$secrets/prefect_database_password'\`
\set mlflow \`cat '$secrets/mlflow_database_password'\`
create role prefect login password :'prefect';
create role mlflow login password :'mlflow';
create database prefect owner prefect;
create database mlflow owner mlflow;
create database mlflow_auth owner mlflow;
revoke connect on database prefect, mlflow, mlflow_auth from public;
\connect prefect
create extension if not exists pg_trgm;
SQL
