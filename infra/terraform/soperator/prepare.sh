#!/usr/bin/env bash
# Nebius' recipe for Soperator at one commit, with our values laid over those of its example: ./prepare.sh
# Terraform reads *.auto.tfvars after terraform.tfvars; of a value that the recipe does not know it would only warn.
set -euo pipefail
cd "$(dirname "$0")"
repository=${RECIPE_REPOSITORY:-https://github.com/nebius/nebius-solutions-library.git}
commit=${RECIPE_COMMIT:-00c54d0035c153692b9bc6f178f00bbff9e8f574}
values=values.auto.tfvars

fail() {
    echo "$*" >&2
    exit 1
}
[ -f "$values" ] || fail "$values is missing: cp $values.example $values, and fill it in"
if left=$(grep -n FILL_IN "$values"); then
    fail "$values is not filled in:"$'\n'"$left"
fi
if [ ! -d recipe/.git ]; then
    git init --quiet recipe
fi
git -C recipe fetch --quiet --depth 1 "$repository" "$commit"
git -C recipe checkout --quiet --force FETCH_HEAD

example=recipe/soperator/installations/example own=recipe/soperator/installations/proving-ground
for name in $(sed -n 's/^\([a-z_0-9]*\) *=.*/\1/p' "$values"); do
    grep -q "^variable \"$name\"" "$example"/*.tf ||
        fail "the recipe at $commit has no variable $name: look for its new name in $example/variables.tf"
done
rm -rf "$own.new"
cp -r "$example" "$own.new"
# A password that everybody knows; without the line it is asked for, or taken from TF_VAR_backups_password.
grep -v '^backups_password' "$example/terraform.tfvars" > "$own.new/terraform.tfvars"
cp "$values" "$own.new/"
# The providers' versions of a cluster that is there.
if [ -f "$own/.terraform.lock.hcl" ]; then
    cp "$own/.terraform.lock.hcl" "$own.new/"
fi
rm -rf "$own"
mv "$own.new" "$own"
echo "ready: cd $PWD/$own, then as README.md says"
