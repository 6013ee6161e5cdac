"""The five functions of docs/exercise.md. Write each body here; `python docs/exercise.py N` checks number N."""

import torch  # noqa: F401 (for the answers)


def reinforce_loss(logps, rewards, mask):
    """1. The loss whose gradient is that of REINFORCE: log-probs weighted by the reward of their row, as a mean over tokens, negated.

        loss = - sum_i sum_t mask_it R_i log pi_it / sum_i sum_t mask_it

    logps (B, T) float32, log pi of the sampled tokens; rewards (B,) float32; mask (B, T) bool, True where a token is trained.
    Returns () float32.
    """
    raise NotImplementedError


def group_advantages(rewards, num_generations):
    """2. Each reward against its own group: centred, and divided by the std of the group. [GRPO sec 4.1.2]

        A_i = (R_i - mean R) / (std R + 1e-6)        the std divides by G

    rewards (B,) float32, the num_generations rows of one prompt adjacent. A group of equal rewards gives zeros. Returns (B,) float32.
    """
    raise NotImplementedError


def clipped_loss(logps, old_logps, advantages, mask, epsilon):
    """3. The clipped objective as a mean over tokens, negated. [GRPO eq 3]

        w_it = pi_it / pi_old_it
        loss = - sum_i sum_t mask_it min(w_it A_i, clip(w_it, 1 - epsilon, 1 + epsilon) A_i) / sum_i sum_t mask_it

    logps, old_logps (B, T) float32; advantages (B,) float32; mask (B, T) bool. Returns () float32.
    """
    raise NotImplementedError


def row_to_replace(rewards, retelling_reward, delta, rho):
    """4. RePO's gate: the place of the rollout that the retelling replaces, or None. [RePO gate] [RePO replacement]

        gamma_fail = 1/G #{i: R_i < delta}
        help the group if gamma_fail >= rho; a retelling is right if its reward is at least delta

    A group that is helped loses its worst rollout, the last of equals, to a retelling that is right. A wrong one replaces nothing.
    rewards: list of G floats; retelling_reward, delta, rho: floats. Returns an int or None.
    """
    raise NotImplementedError


def teacher_weight(logps, gamma):
    """5. LUFFY's weight of a teacher's token. [LUFFY shaping]

        f(p) = p / (p + gamma)        the gradient flows through p: d f / d log p = gamma p / (p + gamma)^2

    logps (T,) float32, log p of the teacher's tokens under the policy. Returns (T,) float32.
    """
    raise NotImplementedError
