"""From ONNX to TensorRT engines, and which of them may run here."""
