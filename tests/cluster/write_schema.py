"""The JSON Schema of a report, as docs/cluster-check.schema.json holds it: ``python -m tests.cluster.write_schema``."""

import json

from tasks.contracts.cluster_report import Report

if __name__ == "__main__":
    print(json.dumps(Report.model_json_schema(mode="serialization"), indent=2))
