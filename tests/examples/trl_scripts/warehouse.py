"""Train an agent that packs orders in a warehouse, with TRL's GRPOTrainer."""

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

SHELVES = {1: ["tea", "cup"], 2: ["pen"], 3: ["lamp"]}


class Warehouse:
    """An order is packed when its item is taken from the right shelf."""

    def reset(self, item: str, **row):
        self.item = item
        self.taken = []
        self.looks = 0
        self.packed = False

    def look(self, shelf: int) -> str:
        """
        See what is on a shelf.

        Args:
            shelf: The shelf's number.

        Returns:
            The items on it.
        """
        self.looks += 1
        return ", ".join(SHELVES[shelf])

    def take(self, shelf: int, item: str) -> str:
        """
        Take an item from a shelf.

        Args:
            shelf: The shelf's number.
            item: The item's name.

        Returns:
            What happened.
        """
        if item not in SHELVES[shelf]:
            raise ValueError(f"there is no {item} on shelf {shelf}")
        self.taken.append(item)
        return f"took {item}"

    def pack(self) -> str:
        """
        Pack what was taken.

        Returns:
            What happened.
        """
        self.packed = True
        return f"packed {len(self.taken)} items"


def delivered(environments, log_metric, **given):
    """1 for an order that is packed with its item."""
    rewards = [float(environment.packed and environment.item in environment.taken) for environment in environments]
    log_metric("warehouse/looks", sum(environment.looks for environment in environments) / len(environments))
    return rewards


def thrift(environments, **given):
    """A little less for everything that was not ordered."""
    return [-0.1 * sum(item != environment.item for item in environment.taken) for environment in environments]


items = ["tea", "pen", "lamp", "cup"]
dataset = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": f"Pack the {item}."}], "item": item} for item in items]
)
args = GRPOConfig(
    output_dir="runs/grpo",
    learning_rate=1e-3,
    per_device_train_batch_size=8,
    num_generations=4,
    max_completion_length=2048,
    max_steps=3,
    logging_steps=1,
    log_completions=True,
    report_to="tensorboard",
)
trainer = GRPOTrainer(
    model="Qwen/Qwen3-0.6B",
    args=args,
    train_dataset=dataset,
    environment_factory=Warehouse,
    reward_funcs=[delivered, thrift],
)
trainer.train()
