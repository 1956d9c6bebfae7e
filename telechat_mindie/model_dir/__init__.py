"""The directory that `build` makes and MindIE serves: its layout, how it is built, inspected and verified."""
