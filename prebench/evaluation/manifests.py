"""What the entry-point group `lmms_eval.models` registers: the names after `lmms-eval --model`.

`prebench` takes any export; the others refuse an export of another variant, so that a table's column can't be made from
the wrong folder.
"""

from lmms_eval.models.registry_v2 import ModelManifest

_ADAPTER = "prebench.evaluation.adapter"

PREBENCH = ModelManifest("prebench", chat_class_path=f"{_ADAPTER}.Prebench")
PREBENCH_BASELINE = ModelManifest("prebench_baseline", chat_class_path=f"{_ADAPTER}.PrebenchBaseline")
PREBENCH_PRE = ModelManifest("prebench_pre", chat_class_path=f"{_ADAPTER}.PrebenchPre")
