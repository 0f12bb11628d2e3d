"""ONNX model input and output, graph analyses and graph edits. No other package reads or writes model files.

Public entry points: `load.load`, `save.save`, `save.save_to_store`, `fingerprint.fingerprint`,
`fingerprint.compute_file_digest`, `interface_metadata.interface_of` and `interface_metadata.write_interface`. Importing this
package imports no ONNX library; importing `load` or `save` imports onnx_ir.
"""
