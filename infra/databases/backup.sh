#!/bin/sh
# backup.sh FOLDER: every database of the stack as a custom-format dump in FOLDER, each whole or absent (written aside, renamed).
# Host, port, user and password are PGHOST, PGPORT, PGUSER, PGPASSWORD. Roles are not dumped: databases.sh makes them.
set -eu
folder=${1:?"usage: backup.sh FOLDER"}
mkdir -p "$folder"
for database in prefect mlflow mlflow_auth; do
    pg_dump --format=custom --no-owner --dbname "$database" --file "$folder/$database.part"
    mv "$folder/$database.part" "$folder/$database.dump"
done
