"""What the questions of `dial` and `adapters` are about: things to explain, jobs to advise on."""

from __future__ import annotations

THINGS = """
a volcano|a glacier|a desert|a river delta|a coral reef|a rainforest|an earthquake|a tornado
a hurricane|a rainbow|an eclipse|a comet|a galaxy|a black hole|a telescope|a microscope
a compass|a thermometer|a barometer|a battery|a magnet|an engine|a bicycle|a submarine
an airplane|a helicopter|a steam engine|a printing press|a camera|a radio|a telephone|a computer
a lighthouse|a windmill|a bridge|a dam|a castle|a cathedral|a library|a museum|a hospital
a university|a parliament|a constitution|an election|a court|a passport|a currency|a bank|a loan
inflation|insurance|a stock market|a budget|a contract|a tax|a violin|a piano|a guitar|a drum
an orchestra|an opera|a symphony|a poem|a novel|a sonnet|a fable|a dictionary|an encyclopedia
a newspaper|an alphabet|a map|a honeybee|a butterfly|an ant|a spider|a whale|a dolphin|a shark
an octopus|a penguin|an owl|an eagle|a parrot|a wolf|a bear|an elephant|a giraffe|a kangaroo
a camel|a horse|a rabbit|a frog|a turtle|a snake|a crocodile|an oak tree|a cactus|a rose
a mushroom|a fern|moss|wheat|rice|bread|cheese|chocolate|coffee|tea|honey|olive oil|salt|gold
silver|iron|copper|glass|paper|silk|cotton|oxygen|hydrogen|carbon|water vapour|gravity
electricity|magnetism|photosynthesis|the heart|the brain|the liver|the skeleton|the skin
a muscle|a vaccine|an antibiotic
"""

JOBS = """
clean a window|wash a sweater|iron a shirt|sew on a button|polish shoes|fold a map|wrap a gift
pack a suitcase|bake bread|boil an egg|cook rice|make soup|brew tea|grind coffee|store apples
peel a mango|plant a tree|water a cactus|grow tomatoes|prune a rose|mow a lawn|keep weeds away
make compost|feed birds|train a puppy|bathe a dog|care for a cat|keep goldfish|groom a horse
raise chickens|house a rabbit|calm a parrot|write a letter|take notes|learn a poem
study for a test|read faster|improve my spelling|learn a language|keep a diary|give a speech
meet new people|say no politely|thank a neighbour|apologise to a friend|plan a party
host a dinner|choose a present|save money|make a budget|ask for a raise|find a job
write a resume|prepare for an interview|start a business|pay off a debt|fall asleep
wake up early|stay calm|stop worrying|build a habit|manage my time|focus at work|take a break
run a race|lift weights|stretch my back|learn to swim|ride a bicycle|climb a hill|play chess
throw a ball|fix a bicycle tire|change a light bulb|hang a picture|paint a wall|sharpen a knife
unclog a sink|oil a hinge|tighten a screw|light a campfire|pitch a tent|read a compass
tie a knot|find clean water|pack for a hike|cross a stream|watch the stars|take a photograph
draw a face|mix colours|play the guitar|sing in tune|tune a violin|write a story|tell a joke
clean a carpet|remove a stain|dust a shelf|organise a desk|sort old papers|recycle glass
save water|save electricity|drive in snow|park a car|wash a car|use a bus timetable|book a hotel
read a train ticket|avoid jet lag|cross a busy road|treat a cold|soothe a sore throat
brush my teeth|wash my hands|drink more water|eat less sugar|clean a small cut|rest my eyes
choose a melon|ripen a banana|keep bread fresh|freeze berries|dry herbs|melt chocolate
whip cream|set a table
"""

TOWNS = """
Lisbon|Oslo|Vienna|Dublin|Prague|Madrid|Athens|Cairo|Lima|Quito|Delhi|Tokyo|Paris|Rome|Bern|Riga
Seoul|Perth|Boston|Denver|Geneva|Milan|Porto|Lyon|Bergen|Krakow|Naples|Seville|Leeds|Cork|Turin
Basel
"""

GOODS = """
brass lamps|oak chairs|wool blankets|tin kettles|silk scarves|wine glasses|clay pots
leather boots|paper fans|iron hooks|glass jars|wax candles|linen sheets|steel knives|straw hats
copper pipes|wooden spoons|rubber tyres|cotton shirts|garden forks|sugar sacks|tea chests
door bells|wall clocks
"""


def listed(text: str) -> list[str]:
    """The entries of one of the lists above, in their order."""
    return [entry for line in text.split("\n") for entry in line.split("|") if entry]
