"""The report's only script: it finds, filters and sorts problems. Without it the page shows everything all the same.

It stands in the file as it is here; the page's own policy allows this text alone, by its hash. It makes its controls
itself and writes text, never markup.
"""

SCRIPT = """
'use strict';
(() => {
  const make = (tag, set, ...parts) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(set)) made.setAttribute(name, value);
    made.append(...parts);
    return made;
  };
  const kinds = [['', 'all problems'], ['apart', 'models differ'], ['lost', 'lost by an artifact'],
    ['gained', 'gained by an artifact'], ['every', 'solved by all'], ['none', 'solved by none']];
  const sortBy = (table, column, down) => {
    const body = table.tBodies[0], key = row => {
      const cell = row.cells[column], rate = cell.dataset.sort;
      return rate === undefined ? cell.textContent : Number(rate);
    };
    const order = (a, b) => typeof key(a) === 'number' ? key(a) - key(b)
      : key(a).localeCompare(key(b), 'en', {numeric: true});
    body.append(...[...body.rows].sort((a, b) => down ? order(b, a) : order(a, b)));
    [...table.tHead.rows[0].cells].forEach((head, at) => {
      if (at === column) head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      else head.removeAttribute('aria-sort');
    });
  };
  document.querySelectorAll('.task').forEach((task, number) => {
    const rows = [...task.querySelectorAll('.matrix tbody tr')], cards = [...task.querySelectorAll('.problem')];
    const whole = task.querySelector('.all');
    if (!rows.length || !whole) return;
    const texts = new Map(cards.map(card => [card.dataset.name, card.textContent.toLowerCase()]));
    const find = make('input', {type: 'search', id: 'find' + number, autocomplete: 'off', spellcheck: 'false'});
    const show = make('select', {id: 'show' + number},
      ...kinds.map(([value, said]) => make('option', {value}, said)));
    const told = make('output', {for: 'find' + number + ' show' + number});
    const tools = make('div', {class: 'tools', role: 'search', 'aria-label': 'problems, task ' + (number + 1)},
      make('span', {}, make('label', {for: 'find' + number}, 'Name, question or answer'), find),
      make('span', {}, make('label', {for: 'show' + number}, 'Show'), show), told);
    const fits = (name, is, words) => (!show.value || is.split(' ').includes(show.value))
      && (!words || name.toLowerCase().includes(words) || (texts.get(name) || '').includes(words));
    const apply = () => {
      const words = find.value.trim().toLowerCase();
      let count = 0;
      for (const row of rows) {
        row.hidden = !fits(row.cells[0].textContent, row.dataset.is, words);
        if (!row.hidden && whole.contains(row)) count++;
      }
      for (const card of cards) card.hidden = !fits(card.dataset.name, card.dataset.is, words);
      if (words || show.value) whole.open = true;
      told.textContent = words || show.value ? count + ' of ' + rows.filter(row => whole.contains(row)).length : '';
    };
    find.addEventListener('input', apply);
    show.addEventListener('change', apply);
    whole.before(tools);
    for (const table of task.querySelectorAll('.matrix')) {
      [...table.tHead.rows[0].cells].forEach((head, column) => {
        const button = make('button', {type: 'button'}, head.textContent);
        button.addEventListener('click', () => sortBy(table, column, head.getAttribute('aria-sort') === 'ascending'));
        head.replaceChildren(button);
      });
    }
  });
  const open = () => {
    const place = location.hash && document.getElementById(location.hash.slice(1));
    if (place && place.tagName === 'DETAILS') place.open = true;
  };
  addEventListener('hashchange', open);
  open();
})();
"""
