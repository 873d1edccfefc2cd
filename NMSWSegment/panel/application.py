"""What the application gives to a scripted module, or what stands in for it with slicer-core, which has the nodes but no panel."""

import slicer

if hasattr(slicer, "app"):
    from slicer.i18n import tr as _
    from slicer.i18n import translate
    from slicer.parameterNodeWrapper import Choice, WithinRange, parameterNodeWrapper
    from slicer.ScriptedLoadableModule import (
        ScriptedLoadableModule,
        ScriptedLoadableModuleLogic,
        ScriptedLoadableModuleTest,
        ScriptedLoadableModuleWidget,
    )
else:

    class ScriptedLoadableModule:
        """Stands where the application has its base class."""

    ScriptedLoadableModuleLogic = ScriptedLoadableModuleTest = ScriptedLoadableModuleWidget = ScriptedLoadableModule

    def _(text: str) -> str:
        """The text itself: translations come from the application."""
        return text

    def translate(context: str, text: str) -> str:
        """The text itself."""
        return text

    def WithinRange(minimum: float, maximum: float) -> tuple[float, float]:
        """The range itself."""
        return minimum, maximum

    def Choice(choices: list[str]) -> tuple[str, ...]:
        """The choices themselves."""
        return tuple(choices)

    def parameterNodeWrapper(wrapped: type) -> type:
        """The class itself."""
        return wrapped


def details_argument(details: str) -> dict[str, str]:
    """The argument of slicer.util.errorDisplay for details, if there are any: given empty ones too, it widens the window to 150 characters."""
    return {"detailedText": details} if details else {}
