"""The graph on disk: the only room that touches the files of a model.

Its doors are `load.load`, `save.save`, `save.save_to_store`, `fingerprint.fingerprint`, `fingerprint.content_digest`,
`interface.interface_of` and `interface.attach`. Importing the room costs nothing, importing `load` or `save` imports onnx_ir.
"""
