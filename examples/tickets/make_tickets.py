"""Writes train.jsonl and dev.jsonl: invented support tickets, each with the one thing that the customer wants now.

    python make_tickets.py [FOLDER]

The same seed gives the same bytes. A ticket is a core sentence of its label, in random order with a greeting, a detail, a
distractor that mentions another topic ("The parcel came on time, though."), and typos. Train and dev share no core and
no distractor: a model has to understand what is wanted, because counting words only carries over in part.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

SEED = 20
ROWS = {"train": 100, "dev": 30}  # a label

PRODUCTS = ["Brewmate coffee maker", "Lumo desk lamp", "Trailhead backpack", "Pulse fitness band", "Nimbus router",
            "Hearth thermostat", "Sonora headphones", "Plotline planner app", "Cargo bike light", "Kestrel drone"]

# What the customer wants. {p} is a product, {o} an order number, {n} a small number, {d} a day, {m} an amount.
CORES: dict[str, dict[str, list[str]]] = {
    "billing": {
        "train": [
            "I was charged twice for my {p} this month.",
            "The invoice for order {o} shows the wrong company address.",
            "Why does my statement list {m} when the plan costs less?",
            "Please update the credit card that my subscription uses.",
            "The discount code was not applied to what I paid.",
            "Can you send me a VAT receipt for the {p}?",
            "My payment was declined although the card is valid.",
            "I do not understand the extra fee of {m} on my bill.",
            "Could we switch from monthly to yearly payment?",
            "The tax on invoice {o} looks wrong to me.",
            "My card expired, where can I enter the new one?",
            "An amount of {m} went off my account and I cannot tell what it is for.",
            "We need the invoice split between two departments.",
            "The price went up this month and nobody told me.",
            "My bank account was debited {n} times for one order.",
            "Accounting asks for all receipts of this year.",
            "Can I pay by PayPal or bank transfer instead?",
            "The voucher took nothing off the total.",
            "Our order reference is missing on the bill.",
            "The amounts on the receipt do not match my order.",
        ],
        "dev": [
            "There are two identical debits from you on my bank statement.",
            "Our bookkeeper needs a copy of last quarter's invoices.",
            "What is this line of {m} that I seem to owe?",
            "I would like to pay by direct debit from now on.",
            "You took the full price even though I had a voucher.",
            "The sum on the receipt for {o} does not add up.",
            "How do I put our purchase order number on the bill?",
            "My bank says that you tried to take the money {n} times.",
            "Which payment methods do you take besides cards?",
            "Our renewal was priced at the old tariff, can somebody check the sum?",
        ],
    },
    "login": {
        "train": [
            "I cannot sign in to my account any more.",
            "The password reset email never arrives.",
            "It says my password is wrong, but I am sure that it is right.",
            "My account is locked after too many attempts.",
            "The code for two-factor authentication is not accepted.",
            "I lost the phone that had my authenticator, how do I get in?",
            "After I changed my email address I cannot log in.",
            "Your site logs me out again and again.",
            "I forgot which username I registered with.",
            "The reset link says that it has expired.",
            "Signing in with Google gives me an empty account.",
            "My colleague left and nobody knows the password of our team account.",
            "The captcha keeps refusing me at the sign-in page.",
            "Somebody else seems to be using my account, please block it.",
            "My profile has been suspended and I want to use it again.",
            "The security code by SMS never comes.",
            "My login data is refused everywhere.",
            "I have no access to the old mailbox, so I cannot recover my account.",
            "The recovery codes are gone and I am locked out.",
            "The sign-in form clears itself and I stay outside.",
        ],
        "dev": [
            "I am shut out of my profile since {d}.",
            "No text message with the verification digits reaches me.",
            "My credentials are rejected on the website and on the phone.",
            "Please let me back in, my access has been suspended.",
            "I no longer have the mailbox that I signed up with and cannot recover my access.",
            "Every time I enter my passphrase the form just comes back empty.",
            "How can I regain entry after losing my backup codes?",
            "My user name is not recognised any longer.",
            "The link for choosing a new password leads nowhere.",
            "I think that a stranger got into my profile, could you secure it?",
        ],
    },
    "shipping": {
        "train": [
            "Where is my order {o}?",
            "The tracking page has not changed for {n} days.",
            "My {p} was due on {d} and is still not here.",
            "Can I change the delivery address of order {o}?",
            "The courier says delivered, but I have no parcel.",
            "How long does delivery to Norway take?",
            "Only one of the two boxes arrived.",
            "Please hold my package until I am back from holiday.",
            "Do you deliver to a pick-up point?",
            "The parcel went back to you because nobody was at home.",
            "I need the {p} before {d}, can you send it by express?",
            "The box is stuck at customs.",
            "You sent my order to my old flat.",
            "When will the {p} that I pre-ordered leave your warehouse?",
            "The carrier has lost my package.",
            "An item is missing from the box that came.",
            "I gave the wrong street, please send it elsewhere.",
            "Has my order been dispatched?",
            "Can the driver leave it at the neighbours' or come after six?",
            "What does next-day delivery cost?",
        ],
        "dev": [
            "I have been waiting for my {p} for {n} weeks now.",
            "The driver left my package with a neighbour that I do not know.",
            "Has {o} been handed to the carrier yet?",
            "Part of my order is missing from the carton.",
            "Could the courier come in the evening instead?",
            "I typed the wrong house number when ordering {o}.",
            "The carrier lists my parcel as lost.",
            "What do you ask for overnight transport to an island?",
            "It was meant to be at my door on {d}, any news?",
            "The status has read 'label printed' for {n} days.",
        ],
    },
    "refund": {
        "train": [
            "I want my money back for the {p}.",
            "I sent the {p} back {n} weeks ago and have not been reimbursed.",
            "Please cancel order {o} and return the payment.",
            "How do I send the {p} back?",
            "The {p} is not what I expected, I would like to return it.",
            "When will the {m} be back on my card?",
            "You refunded only a part of what I paid.",
            "I would rather have the money than a replacement.",
            "Can I return the {p} without the original box?",
            "I changed my mind about order {o}, please take it back.",
            "Is it too late to return something that I bought in spring?",
            "The return label that you sent cannot be printed.",
            "I bought the wrong size and want to give it back.",
            "You promised a refund on {d} and nothing has come.",
            "Please pay me back the {m} for the {p}.",
            "I use my right of withdrawal for this purchase.",
            "Do I have to pay for the return parcel?",
            "It was a gift and we have one already, please take it back.",
            "I got a coupon, but I want the real money.",
            "What are your rules for returns of opened goods?",
        ],
        "dev": [
            "Please reimburse me, the {p} is of no use to me.",
            "My returned item reached you on {d}, so where is my {m}?",
            "I wish to withdraw from the purchase within the fourteen days.",
            "Who pays the postage if I send the {p} back?",
            "You credited me less than the {p} had cost.",
            "I no longer want it; kindly undo the sale and repay me.",
            "It was a present that she already has, can we hand it in again?",
            "The shop credit is no good to me, I want cash.",
            "What are the conditions for giving a used {p} back?",
            "I am still waiting for the repayment of {m}.",
        ],
    },
    "bug": {
        "train": [
            "The app crashes as soon as I open the settings.",
            "My {p} stopped syncing after the last update.",
            "The screen of the {p} stays black.",
            "Exporting my data gives an empty file.",
            "The {p} switches itself off every {n} minutes.",
            "The battery level always shows 100 percent.",
            "Notifications come three times each.",
            "The chart shows dates from next year.",
            "Since the new firmware the {p} loses its connection.",
            "The search finds nothing, not even exact names.",
            "I get error {n}04 whenever I save.",
            "The left side of my {p} makes no sound.",
            "The app freezes on the start page.",
            "The timer of the {p} runs slow by {n} minutes an hour.",
            "The buttons of the {p} do not react.",
            "The website shows a white page when I add a photo.",
            "My saved data disappeared overnight.",
            "The {p} gets hot and restarts by itself.",
            "The {p} makes a strange noise and will not stop.",
            "The numbers in the report are calculated wrongly.",
        ],
        "dev": [
            "Nothing happens when I press the start button of the {p}.",
            "The page goes blank after I upload a picture.",
            "My {p} heats up and then reboots.",
            "All my entries from {d} have vanished.",
            "It keeps beeping although nothing is wrong.",
            "Totals on the overview are off by one day.",
            "The {p} no longer pairs with my phone since the upgrade.",
            "A message about an unknown exception pops up all the time.",
            "Scrolling makes the whole window flicker.",
            "The sensor reports {n}0 degrees too much.",
        ],
    },
    "feature": {
        "train": [
            "It would be great if the {p} had a dark mode.",
            "Could you add an export to Excel?",
            "Please support a second language in the app.",
            "I would love to see a widget for the home screen.",
            "Is there a plan to connect the {p} to my calendar?",
            "A way to sort my list by date would help a lot.",
            "Have you thought about a family plan?",
            "My suggestion: let us name the rooms ourselves.",
            "Can you make the {p} work with voice assistants?",
            "I miss a button that undoes the last step.",
            "Please consider larger fonts for older people.",
            "An offline mode is the one thing I still wish for.",
            "Will you offer the {p} in green some day?",
            "It should be possible to share a report with others.",
            "Please think about keyboard commands.",
            "I would like to set times at which the {p} turns on.",
            "A tablet app would be wonderful.",
            "An idea: let users put devices into groups.",
            "Could you offer an API to developers?",
            "A monthly overview by email would be nice to have.",
        ],
        "dev": [
            "One idea for the next version: shortcuts on the keyboard.",
            "I wish that I could schedule the {p} for weekends.",
            "Any chance of a version for tablets?",
            "You might let people group their devices.",
            "How about a quiet mode for the night?",
            "An interface for programmers would make the {p} perfect.",
            "Would you think about letting us choose our own colours?",
            "I am hoping for a weekly summary by mail in the future.",
            "What I lack is a way to compare two months side by side.",
            "Please put templates on your roadmap.",
        ],
    },
}

# Sentences that mention a topic without asking for anything; a ticket takes those of OTHER labels.
DISTRACTORS: dict[str, dict[str, list[str]]] = {
    "billing": {
        "train": ["The invoice was fine, by the way.", "I pay {m} a month for this.", "My card was charged correctly.",
                  "The bill is paid.", "Nothing is wrong with the price."],
        "dev": ["The bill itself is in order.", "I have been paying {m} for years.", "My bank details are up to date."],
    },
    "login": {
        "train": ["I can sign in without trouble.", "I already changed my password.", "My account is the one for order {o}.",
                  "The login is fine.", "I am signed in as usual."],
        "dev": ["Logging in works.", "Resetting my password did not help.", "I am writing from my usual account."],
    },
    "shipping": {
        "train": ["The parcel came on time, though.", "Delivery took only {n} days.", "It arrived on {d}.",
                  "Shipping was quick.", "The box came in good shape."],
        "dev": ["The courier was quick, I must say.", "The package got here on {d}.", "Shipping was faster than promised."],
    },
    "refund": {
        "train": ["I do not want my money back.", "My last refund was quick, thanks.", "Returning it is not what I am after.",
                  "I am keeping it.", "No need for a refund."],
        "dev": ["I am not asking for a refund.", "An earlier return went smoothly.", "I would rather keep it than send it back."],
    },
    "bug": {
        "train": ["The {p} itself works well.", "It is not broken.", "The crash from last month is gone.",
                  "Everything runs as it should.", "You fixed my last problem, thanks."],
        "dev": ["There is no fault with the {p}.", "The error from before is fixed.", "Apart from that it runs without a hitch."],
    },
    "feature": {
        "train": ["I like the new dark mode.", "Thanks for adding the export.", "The feature that I asked for is there.",
                  "The latest update is nice.", "You added what I had proposed."],
        "dev": ["The new widget is lovely.", "Good that you built what I suggested.",
                "The last version brought what I wished for."],
    },
}

GREETINGS = ["Hi,", "Hello,", "Dear team,", "Good morning,", "hey", "Hi there,", "To whom it may concern:", "", "", ""]
OPENINGS = ["I bought a {p} in your shop.", "We use the {p} at work.", "I have been a customer for {n} years.",
            "This is about my {p}.", "Order {o}.", "I wrote to you on {d} already.", "My wife and I share a {p}."]
CLOSINGS = ["Thanks!", "Please help.", "Kind regards, {name}", "Thank you in advance.", "This is really annoying!!",
            "I expect an answer by {d}.", "cheers, {name}", "Please get back to me soon.", "Not happy.", "Best, {name}"]
NAMES = ["Ana", "Ben", "Chloe", "Deniz", "Emil", "Farah", "Goran", "Hanna", "Ivo", "Jun", "Kaja", "Luis"]
DAYS = ["Monday", "Tuesday", "Thursday", "Friday", "the 3rd", "the 14th", "May 2", "last week"]


def fill(text: str, rng: random.Random) -> str:
    """The sentence with every placeholder replaced."""
    return text.format(p=rng.choice(PRODUCTS), o=f"#{rng.randrange(10_000, 99_999)}", n=rng.randrange(2, 9),
                       d=rng.choice(DAYS), m=f"{rng.randrange(5, 300)}.{rng.randrange(10, 99)} EUR", name=rng.choice(NAMES))


def with_typos(text: str, rng: random.Random) -> str:
    """The text with one or two slips: swapped, dropped or doubled letters, or no capitals at all."""
    for _ in range(rng.randrange(1, 3)):
        place = rng.randrange(1, len(text) - 2)
        slip = rng.random()
        if slip < 0.4:
            text = text[:place] + text[place + 1] + text[place] + text[place + 2:]
        elif slip < 0.7:
            text = text[:place] + text[place + 1:]
        else:
            text = text[:place] + text[place] + text[place:]
    return text.lower() if rng.random() < 0.4 else text


def ticket(label: str, part: str, rng: random.Random) -> str:
    """One ticket of a label."""
    middle = [rng.choice(CORES[label][part])]
    others = [other for other in CORES if other != label]
    for other in rng.sample(others, k=rng.choice([0, 0, 1, 1])):
        middle.insert(rng.choice([0, len(middle)]), rng.choice(DISTRACTORS[other][part]))
    if rng.random() < 0.5:
        middle.insert(0, rng.choice(OPENINGS))
    if rng.random() < 0.5:
        middle.append(rng.choice(CLOSINGS))
    text = " ".join(fill(sentence, rng) for sentence in (rng.choice(GREETINGS), *middle) if sentence)
    return with_typos(text, rng) if rng.random() < 0.35 else text


def tickets(part: str) -> Iterator[dict[str, str]]:
    """All rows of a part in random order, none of them twice, no fewer than eight words."""
    rng = random.Random(f"{SEED} {part}")
    texts: dict[str, str] = {}
    for label in CORES:
        wanted = len(texts) + ROWS[part]
        while len(texts) < wanted:
            text = ticket(label, part, rng)
            if len(text.split()) >= 8:
                texts.setdefault(text, label)
    rows = [{"text": text, "label": label} for text, label in texts.items()]
    rng.shuffle(rows)
    yield from rows


def main(folder: Path) -> None:
    """Write both files into a folder."""
    for part in ROWS:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in tickets(part)]
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
