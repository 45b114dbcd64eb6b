"""The eight tasks of Gu et al. 2024 (Model Editing Harms General Abilities of Large Language Models) for lm-eval.

Each YAML here is one task. records.py reads the authors' files, and answers.py scores what a model writes. Where their
scripts count in a way that no reader would expect, answers.py says what is done instead.
"""
