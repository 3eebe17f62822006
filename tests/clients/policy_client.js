// Runs an exported policy with onnxruntime-node: node policy_client.js policy.onnx WIDTH < observations
// Reads observations of WIDTH numbers each; writes the action, the value and the logits of each, one line a row.
const fs = require("fs");
const ort = require("onnxruntime-node");

async function main() {
  const [path, width] = [process.argv[2], Number(process.argv[3])];
  const numbers = fs.readFileSync(0, "utf8").trim().split(/\s+/).map(Number);
  const rows = numbers.length / width;
  const policy = await ort.InferenceSession.create(path);
  const obs = new ort.Tensor("float32", Float32Array.from(numbers), [rows, width]);
  const { logits, value, action } = await policy.run({ obs });
  const actions = logits.dims[1];
  for (let row = 0; row < rows; row++) {
    const its = logits.data.slice(row * actions, (row + 1) * actions);
    console.log([action.data[row], value.data[row], ...its].join(" "));
  }
}

main();
