"""A continuing task that a time limit cuts into episodes: what it costs to take a time limit for an end.

    PYTHONPATH=benchmarks python ppo_clip_discrete.py --env-id time_limit_env:Corridor4-v0 --eval-episodes 0

A corridor of 5 cells. Action 0 steps left, and earns a crumb of 1 against the left wall; action 1 steps right, and from
the last cell earns 10 and leads back to the left wall. Left for ever earns 1 a step, right for ever 10 in 5 steps: 2 a
step. No observation shows the clock, and nothing happens when it rings: the next episode goes on in the cell where the
last one stopped. So an episode's mean return over its limit is the reward per step of the continuing task.

Under a limit of 4 steps an agent that takes the time limit for the end of the world never sees the walk from the left
wall pay, and stays for the crumbs. One that bootstraps the value of the final observation walks (Pardo et al. 2018,
arXiv:1712.00378, "partial-episode bootstrapping"). Under a limit of 64 steps both walk: the limit is all that differs.
"""

import gymnasium as gym

CELLS = 5


class Corridor(gym.Env):
    observation_space = gym.spaces.Discrete(CELLS)
    action_space = gym.spaces.Discrete(2)
    cell = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.cell is None:  # only a new environment begins somewhere
            self.cell = int(self.np_random.integers(CELLS))
        return self.cell, {}

    def step(self, action):
        if action == 0:
            reward = float(self.cell == 0)
            self.cell = max(self.cell - 1, 0)
        else:
            self.cell = (self.cell + 1) % CELLS
            reward = 10.0 * (self.cell == 0)
        return self.cell, reward, False, False, {}


for limit in (4, 64):
    gym.register(f"Corridor{limit}-v0", entry_point=Corridor, max_episode_steps=limit)
