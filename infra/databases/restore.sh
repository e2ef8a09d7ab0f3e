#!/bin/sh
# restore.sh FOLDER: drop the databases and make them again from backup.sh's dumps. Stop Prefect, MLflow and workers before.
# All dumps are read through before anything is dropped.
set -eu
folder=${1:?"usage: restore.sh FOLDER"}
for database in prefect mlflow mlflow_auth; do
    # To its end: the list alone stands at the beginning, and a dump may have been cut when it was copied.
    pg_restore --file=/dev/null "$folder/$database.dump"
done
for database in prefect mlflow mlflow_auth; do
    owner=${database%_auth}
    dropdb --if-exists --force "$database"
    createdb --owner "$owner" "$database"
    psql --quiet --no-psqlrc -v ON_ERROR_STOP=1 --dbname "$database" --command "revoke connect on database $database from public" \
        --command "create extension if not exists pg_trgm"
    # The dump's own statement about the extension is the administrator's; all else becomes the role's.
    pg_restore --list "$folder/$database.dump" | grep -v "EXTENSION" > "$folder/$database.list"
    pg_restore --exit-on-error --no-owner --role "$owner" --use-list "$folder/$database.list" --dbname "$database" "$folder/$database.dump"
    rm "$folder/$database.list"
done
