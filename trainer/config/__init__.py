"""The configuration: `sections` has every setting with its default, `cli` reads YAML files and command lines.

`recipe` reports where a configuration leaves the published recipe.
"""
