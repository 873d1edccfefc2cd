"""Stand-ins for what the application adds to Python, so that the panel is tested without it.

PythonQt, CTK and the qMRML widgets exist on no package index. These are written from documented behavior, on PySide6 and
slicer-core, and refuse every name that a real application does not have (api.json). Start with standins.application.
"""
