// The formulas of tucker_ref/costs.py, function by function; tests/test_interactive.py compares what they give.
// Of each: parameters, numbers cached a token, multiply-adds a token, a pair of tokens, and once per update of the weights.

function gqaCost(d, n_H, n_KV) {
  const width = d / n_H;
  const [inner, kv] = [n_H * width, n_KV * width];
  const parameters = 2 * d * inner + 2 * d * kv;
  return { parameters, cache: 2 * kv, projections: parameters, attention: 2 * inner, once: 0 };
}

function mhaCost(d, n_H) {
  return gqaCost(d, n_H, n_H);
}

// d_c: the width of the query latent and of the key and value latents.
function mlaCost(d, n_H, d_c, shared) {
  const width = d / n_H;
  const latents = shared ? 1 : 2;
  const parameters = d * (d_c + latents * d_c) + n_H * (d_c * width + d_c * 2 * width) + n_H * width * d;
  return { parameters, cache: latents * d_c, projections: parameters, attention: n_H * 2 * width, once: 0 };
}

// pre: ranks of head, query, key. post: of head, output, value.
function tuckerCost(d, n_H, pre, post, shared) {
  const [r, s, t] = pre;
  const [u, o, v] = post;
  const factors = d * (s + t + o) + (shared ? 0 : d * v);
  return {
    parameters: n_H * (r + u) + factors + r * s * t + u * o * v,
    cache: shared ? t : t + v,
    projections: factors + n_H * (s * t + o * v), // latents in and out, then each head's own small matrix
    attention: n_H * (t + v),
    once: n_H * (r * s * t + u * o * v),
  };
}
