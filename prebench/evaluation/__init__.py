"""Evaluation through lmms-eval: engine, adapter, runner. The only package that imports lmms_eval."""
